// What the target inherits: environment, descriptors, signals, limits.

#include "figures.hpp"

#include <set>

using namespace support;

namespace {

std::set<std::string> set_of(const std::string &text) {
  const auto lines = lines_of(text);
  return {lines.begin(), lines.end()};
}

bool has(const std::string &text, const std::string &part) {
  return text.find(part) != std::string::npos;
}

std::string body_of(int port, const std::string &target) {
  const auto response = get(port, target);
  CHECK(response.status == 200);
  return response.body;
}

} // namespace

TEST_CASE("environment: inherited but for warmproxy's own variables") {
  auto environment = serve_fake();
  environment["WARMPROXY_ENV_TEST"] = "1";
  environment["SOMETHING"] = "else";
  environment["EMPTY"] = "";
  ServeProcess serve(environment);
  const auto inherited = "\n" + body_of(serve.port(), "/env");
  CHECK(inherited.find("\nSOMETHING=else\n") != std::string::npos);
  CHECK(inherited.find("\nEMPTY=\n") != std::string::npos);
  CHECK(inherited.find("\nPATH=") != std::string::npos);
  CHECK(inherited.find("WARMPROXY_") == std::string::npos);
  // PORT is the target's, not ours.
  CHECK(inherited.find("\nPORT=" + std::to_string(serve.port()) + "\n") ==
        std::string::npos);
}

TEST_CASE("environment: nothing is added but PORT and PWD") {
  auto environment = serve_fake();
  environment.insert({{"WARMPROXY_STATUS_PATH", "/-/status"},
                      {"WARMPROXY_ENV_SECRET", "1"},
                      {"VERCEL_IPC_PATH", "/not/there"},
                      {"HOST", "127.0.0.1"},
                      {"HOSTNAME", "0123456789ab"},
                      {"DATABASE_URL", "postgres://meant"},
                      {"EMPTY", ""},
                      {"LANG", "C=C"}});
  Within proxy("exec env -u PWD -u OLDPWD -u SHLVL -u _ \"$@\"", environment);
  auto inherited = set_of(get(proxy.port(), "/env").body);
  const auto status = get(proxy.port(), "/-/status").body;
  const auto port = status.substr(status.find("\"port\":") + 7);
  char directory[4096] = "";
  REQUIRE(getcwd(directory, sizeof(directory)));
  CHECK(inherited ==
        std::set<std::string>{"PORT=" + port.substr(0, port.find(',')),
                              "PATH=/usr/sbin:/usr/bin:/sbin:/bin",
                              "PWD=" + std::string(directory),
                              "DATABASE_URL=postgres://meant",
                              "EMPTY=", "LANG=C=C"});
}

TEST_CASE("environment: what would mislead the target is not inherited") {
  const std::map<std::string, std::string> misleading = {
      {"HOST", "0.0.0.0"},
      {"HOSTNAME", "0123456789ab"},
      {"LISTEN_FDS", "1"},
      {"LISTEN_FDNAMES", "http"},
      {"LISTEN_PID", "1"},
      {"NODE_CHANNEL_FD", "3"},
      {"NODE_CHANNEL_SERIALIZATION_MODE", "json"}};
  auto environment = serve_fake();
  environment.insert(misleading.begin(), misleading.end());
  environment["LISTEN_ADDR"] = "meant";
  ServeProcess proxy(environment);
  const auto inherited = "\n" + get(proxy.port(), "/env").body;
  for (const auto &variable : misleading) {
    CAPTURE(variable.first);
    CHECK(!has(inherited, "\n" + variable.first + "="));
  }
  CHECK(has(inherited, "\nLISTEN_ADDR=meant\n"));
}

// In the background of our session it would be stopped, should it use the
// terminal.
TEST_CASE("environment: the target has a process group of its own, and where "
          "there is a terminal a session") {
  RunningProxy proxy(fake_target());
  const auto pid = static_cast<pid_t>(std::stol(body_of(proxy.port(), "/pid")));
  const int terminal = open("/dev/tty", O_RDONLY | O_CLOEXEC);
  CHECK(getsid(pid) == (terminal >= 0 ? pid : getsid(0)));
  CHECK(getpgid(pid) == pid);
  if (terminal >= 0) { close(terminal); }
}

TEST_CASE("environment: Options::env adds and overrides") {
  auto options = fake_target();
  options.env = {{"PATH", "/nowhere"}, {"ADDED", "a=b c"}};
  RunningProxy proxy(options);
  const auto environment = "\n" + body_of(proxy.port(), "/env");
  CHECK(environment.find("\nPATH=/nowhere\n") != std::string::npos);
  CHECK(environment.find("\nADDED=a=b c\n") != std::string::npos);
}

TEST_CASE("environment: default signals and standard descriptors only") {
  // What an embedding program may have changed.
  sigset_t blocked, before;
  sigemptyset(&blocked);
  sigaddset(&blocked, SIGUSR1);
  pthread_sigmask(SIG_BLOCK, &blocked, &before);
  const auto ignored = signal(SIGUSR2, SIG_IGN);
  const int open = dup(0);
  {
    RunningProxy proxy(fake_target());
    CHECK(body_of(proxy.port(), "/signals") == "blocked:\nignored:\n");
    CHECK(body_of(proxy.port(), "/fds") == "0\n1\n2\n");
  }
  close(open);
  signal(SIGUSR2, ignored);
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

TEST_CASE("environment: nothing of a careless parent is inherited") {
  // From the parent, and while many connections are open.
  Within proxy("trap '' INT QUIT USR1 USR2 PIPE CHLD TERM; "
               "exec 5</dev/null 9>/dev/null; exec \"$@\"",
               serve_fake());
  std::list<RawClient> clients;
  for (int i = 0; i < 10; ++i) {
    clients.emplace_back(proxy.port());
    clients.back().send("GET /fds HTTP/1.1\r\nHost: test\r\n\r\n");
  }
  for (auto &client : clients) {
    CHECK(client.read_response().body == "0\n1\n2\n");
  }
  const auto pid =
      static_cast<pid_t>(std::atol(get(proxy.port(), "/pid").body.c_str()));
  CHECK(get(proxy.port(), "/signals").body == "blocked:\nignored:\n");
  char input[100] = "";
  CHECK(readlink(proc_file(pid, "fd/0").c_str(), input, sizeof(input) - 1) > 0);
  CHECK(std::string(input) == "/dev/null");

  // Nor after a restart while clients are connected.
  kill_one(pid);
  CHECK(wait_for([&] {
    return clients.front().get("/fds").body == "0\n1\n2\n" &&
           std::atol(get(proxy.port(), "/pid").body.c_str()) != pid;
  }));
}

TEST_CASE("environment: the original limit on open files is inherited") {
  Within proxy("ulimit -Sn 300; ulimit -Hn 2000; exec \"$@\"", serve_fake());
  const auto pid =
      static_cast<pid_t>(std::atol(get(proxy.port(), "/pid").body.c_str()));
  rlimit files{};
  REQUIRE(prlimit(pid, RLIMIT_NOFILE, nullptr, &files) == 0);
  CHECK(files.rlim_cur == 300);
  CHECK(files.rlim_max == 2000);
}
