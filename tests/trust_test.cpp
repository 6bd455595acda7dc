// What a client can make the target believe, what the target gets from us that
// it did not ask for, and what we tell anybody who asks.

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

} // namespace

// ---- what the target is made to believe -------------------------------------

TEST_CASE("of who asked, and how, a client can only add to the chain") {
  Stage stage(answering(ok()));
  RawClient client(stage.port());
  for (const std::string lie :
       {"X-Forwarded-For: 10.0.0.1\r\n", "x-forwarded-for: 10.0.0.1\r\n",
        "X-Forwarded-For: 10.0.0.1\r\nX-Forwarded-For: 10.0.0.2\r\n",
        "X-Forwarded-For:\r\n", "X-Forwarded-For: ,\r\n",
        "X-Forwarded-For: 10.0.0.1\r\nConnection: X-Forwarded-For\r\n",
        "X-Forwarded-Proto: https\r\nX-Forwarded-Host: bank.example\r\n",
        "X-FORWARDED-PROTO: https\r\nx-forwarded-HOST: bank.example\r\n",
        "Connection: X-Forwarded-Proto, X-Forwarded-Host\r\n",
        "X_Forwarded_Proto: https\r\nX-Forwarded_Host: bank.example\r\n",
        "x_vercel-internal-request-id: https\r\n",
        "X-Vercel-Internal-Invocation-Id: 1\r\n",
        "x-vercel-internal-bot-check: pass\r\n"}) {
    CAPTURE(lie);
    CHECK(client.get("/", lie).status == 200);
    const auto headers = headers_of(stage.last().head);
    std::string chain;
    for (const auto &h : headers) {
      if (same_name(h.first, "X-Forwarded-For")) { chain += "," + h.second; }
      CHECK(!has(h.second, "bank.example"));
      CHECK(!has(h.second, "https"));
      CHECK(!same_name(h.first.substr(0, 18), "x-vercel-internal-"));
    }
    // Whoever counts from the end finds who we were asked by.
    const auto last = chain.find_last_of(", ");
    CHECK(chain.substr(last + 1) == "127.0.0.1");
    CHECK(count_of(headers, "X-Forwarded-Proto") == 1);
    CHECK(count_of(headers, "X-Forwarded-Host") == 1);
    CHECK(header_of(headers, "X-Forwarded-Proto") == "http");
    CHECK(header_of(headers, "X-Forwarded-Host") == "test");
  }
}

TEST_CASE("what is answered here does not reach the target") {
  Stage stage(answering(ok()), [](warmproxy::Options &options) {
    options.status_path = "/-/status";
    options.cors_origins = {"https://a.example"};
  });
  RawClient client(stage.port());
  CHECK(client.get("/-/status").status == 200);
  CHECK(client.get("/-/status?format=prometheus").status == 200);
  CHECK(client.post("/-/status", "x", "Connection: keep-alive\r\n").status ==
        200);
  CHECK(exchange(stage.port(),
                 "OPTIONS / HTTP/1.1\r\nHost: test\r\nOrigin: "
                 "https://a.example\r\nAccess-Control-Request-Method: "
                 "PUT\r\n\r\n")
            .status == 204);
  CHECK(stage.target.requests().empty());
}

// ---- what the target inherits
// ------------------------------------------------

TEST_CASE("the target's environment is ours, less what is for us alone") {
  auto environment = serve_fake();
  environment.insert({{"WARMPROXY_STATUS_PATH", "/-/status"},
                      {"WARMPROXY_ENV_SECRET", "1"},
                      {"VERCEL_IPC_PATH", "/not/there"},
                      {"HOST", "127.0.0.1"},
                      {"DATABASE_URL", "postgres://meant"},
                      {"EMPTY", ""},
                      {"LANG", "C=C"}});
  Within proxy("exec env -u PWD -u OLDPWD -u SHLVL -u _ \"$@\"", environment);
  auto inherited = set_of(get(proxy.port(), "/env").body);
  const auto status = get(proxy.port(), "/-/status").body;
  const auto port = status.substr(status.find("\"port\":") + 7);
  // Where we listen is not where it shall listen.
  inherited.erase("HOST=127.0.0.1");
  CHECK(inherited ==
        std::set<std::string>{"PORT=" + port.substr(0, port.find(',')),
                              "PATH=/usr/sbin:/usr/bin:/sbin:/bin",
                              "DATABASE_URL=postgres://meant",
                              "EMPTY=", "LANG=C=C"});
}

TEST_CASE("the address that we listen on is not the target's") {
  auto environment = serve_fake();
  environment["HOST"] = "0.0.0.0";
  ServeProcess proxy(environment);
  CHECK(!has("\n" + get(proxy.port(), "/env").body, "\nHOST=0.0.0.0\n"));
}

TEST_CASE("the target inherits nothing that was open, ignored or blocked") {
  // As from a careless parent; and with all that is open while we serve.
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

  // Started again while clients are there, it gets no more.
  kill_one(pid);
  CHECK(wait_for([&] {
    return clients.front().get("/fds").body == "0\n1\n2\n" &&
           std::atol(get(proxy.port(), "/pid").body.c_str()) != pid;
  }));
}

TEST_CASE("the target gets the limits that we were given") {
  Within proxy("ulimit -Sn 300; ulimit -Hn 2000; exec \"$@\"", serve_fake());
  const auto pid =
      static_cast<pid_t>(std::atol(get(proxy.port(), "/pid").body.c_str()));
  rlimit files{};
  REQUIRE(prlimit(pid, RLIMIT_NOFILE, nullptr, &files) == 0);
  CHECK(files.rlim_cur == 300);
  CHECK(files.rlim_max == 2000);
}

TEST_CASE("a signal that we were told to ignore does not end us") {
  // As `nohup` does, and a shell with what it starts in the background.
  Within proxy("trap '' HUP INT; exec \"$@\"", serve_fake());
  CHECK(get(proxy.port()).status == 200);
  proxy.signal(SIGHUP);
  proxy.signal(SIGINT);
  CHECK(get(proxy.port()).status == 200);
  CHECK(!has(proxy.err(), "stopping"));
  proxy.signal(SIGTERM);
  CHECK(proxy.wait() == 0);
}

// ---- what we tell
// ------------------------------------------------------------

TEST_CASE("no answer of ours tells a path, an argument or the environment") {
  TemporaryDirectory directory;
  const auto secret = directory / "s3cret";
  REQUIRE(mkdir(secret.c_str(), 0755) == 0);
  const auto program = secret + "/program";
  write_file(program, "\x7f"
                      "ELF but not really");
  chmod(program.c_str(), 0755);

  warmproxy::Options options;
  options.binary = program;
  options.args = {"--token", "s3cret"};
  options.env = {{"TOKEN", "s3cret"}};
  options.directory = secret;
  options.startup_timeout = Milliseconds(200);
  options.stop_timeout = Milliseconds(50);
  options.status_path = "/-/status";
  int expected = 502;
  SUBCASE("it cannot be executed") {}
  SUBCASE("it has gone") { unlink(program.c_str()); }
  SUBCASE("its directory has gone") { options.directory = secret + "/gone"; }
  SUBCASE("there is no copy to be made of it") {
    options.scratch = program + "/s3cret";
  }
  SUBCASE("it ends") {
    options.binary = "/bin/sh";
    options.args = {"-c", "exit 3 # s3cret"};
  }
  SUBCASE("it does not listen") {
    options.binary = "/bin/sh";
    options.args = {"-c", "sleep 600 # s3cret"};
    expected = 504;
  }
  RunningProxy proxy(options);
  const auto checked = [&](const std::string &request) {
    const auto response = exchange(proxy.port(), request);
    CAPTURE(response.head + response.body);
    const auto text = response.head + response.body;
    CHECK(!has(text, "s3cret"));
    CHECK(!has(text, directory.path()));
    CHECK(!has(text, "asked-for"));
    CHECK(!has(text, "Server:"));
    return response.status;
  };
  const std::string host = " HTTP/1.1\r\nHost: asked-for\r\n";
  CHECK(checked("GET /asked-for" + host + "\r\n") == expected);
  CHECK(checked("GET /asked-for" + host + "Accept: text/html\r\n\r\n") >= 502);
  CHECK(checked("POST /" + host + "Content-Length: 2\r\n\r\nab") >= 502);
  CHECK(checked("GET /-/status" + host + "\r\n") == 200);
  CHECK(checked("GET /-/status?format=prometheus" + host + "\r\n") == 200);
  CHECK(checked("GET /<asked-for>\r\n\r\n") == 400);
  CHECK(checked("GET / HTTP/1.1\r\nasked-for\r\n\r\n") == 400);
  CHECK(checked("asked-for / HTTP/9.9\r\n\r\n") == 505);
  CHECK(checked("GET /" + host + "Transfer-Encoding: asked-for\r\n\r\n") ==
        501);
}

TEST_CASE("the status tells what it says it does, and no more") {
  auto options = fake_target({"s3cret"});
  options.args = {"--args-follow", "s3cret"};
  options.status_path = "/-/status";
  RunningProxy proxy(options);
  CHECK(get(proxy.port()).status == 200);
  auto json = get(proxy.port(), "/-/status").body;
  std::vector<std::string> names;
  for (std::size_t at = 0; (at = json.find("\":", at)) != std::string::npos;) {
    const auto begin = json.rfind('"', at - 1) + 1;
    names.push_back(json.substr(begin, at - begin));
    at += 2;
  }
  CHECK(names == std::vector<std::string>{"state", "pid", "port", "starts",
                                          "last_exit", "up_seconds",
                                          "last_start_seconds", "requests",
                                          "in_flight", "connections"});
  CHECK(!has(json, "s3cret"));
  CHECK(!has(json, "/"));
}

TEST_CASE("without a status path there is no status") {
  Stage stage(answering(ok("the target's")));
  for (const std::string path : {"/status", "/-/status", "/", "/metrics"}) {
    CHECK(get(stage.port(), path).body == "the target's");
  }
}
