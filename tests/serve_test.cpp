// serve(), seen from outside as build/warmproxy: its status codes and lines,
// its surroundings, its signals; and a Proxy's life within a program.

#include "restricted.hpp"

#include <sys/stat.h>

#include <filesystem>

using namespace support;
using namespace std::chrono_literals;

namespace {

std::size_t count_lines(const std::string &text) {
  return lines_of(text).size();
}

bool contains(const std::string &text, const std::string &part) {
  return text.find(part) != std::string::npos;
}

// The program that a process runs.
std::string executable(const std::string &pid) {
  return std::filesystem::read_symlink("/proc/" +
                                       pid.substr(0, pid.find('\n')) + "/exe");
}

std::string descriptor(pid_t pid, int fd) {
  std::error_code error;
  return std::filesystem::read_symlink(
      proc_file(pid, "fd/") + std::to_string(fd), error);
}

std::size_t zombies_of(pid_t parent) {
  std::size_t count = 0;
  for (const auto &entry : std::filesystem::directory_iterator("/proc")) {
    const auto pid =
        static_cast<pid_t>(std::atol(entry.path().filename().string().c_str()));
    const auto stat = pid > 0 ? read_file(proc_file(pid, "stat")) : "";
    char state = 0;
    int of = 0;
    if (std::sscanf(stat.c_str() + std::min(stat.rfind(')'), stat.size()),
                    ") %c %d", &state, &of) == 2 &&
        state == 'Z' && of == parent) {
      ++count;
    }
  }
  return count;
}

// How the target ended last, by the status; "" if it never did.
std::string last_exit(int port) {
  const auto status = get(port, "/-/status").body;
  const std::string before = "\"last_exit\":\"";
  const auto at = status.find(before);
  if (at == std::string::npos) { throw Error("no last_exit in " + status); }
  const auto begin = at + before.size();
  return status.substr(begin, status.find('"', begin) - begin);
}

// A shell script that ends in `exec "$@"`, with build/warmproxy to execute.
// Unlike Within, it may end at once.
class Script : public Process {
public:
  Script(const std::string &script, Environment environment,
         const std::string &program = built("warmproxy"))
      : Process("/bin/sh", {"-c", script, "sh", program},
                complete(std::move(environment))) {}

private:
  static Environment complete(Environment environment) {
    environment.emplace("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    environment.emplace("HOST", "127.0.0.1");
    environment.emplace("PORT", "0");
    return environment;
  }
};

// warmproxy as PID 1 of its own PID namespace.
const std::string alone = "unshare -p -f --kill-child ";

pid_t only_child(pid_t parent) {
  const auto all = children_of(parent);
  if (all.size() != 1) { throw Error("not one child"); }
  return all.front();
}

} // namespace

// ---- what cannot be served --------------------------------------------------

TEST_CASE("serve: bad settings are one line, and status 2") {
  TemporaryDirectory directory;
  const auto starts = directory / "starts";
  auto environment = serve_fake({"--count-file", starts});
  environment["WARMPROXY_PREWARM"] = "1";
  std::vector<std::string> expected;
  const auto set = [&](const std::string &name, const std::string &value) {
    environment[name] = value;
    expected = {name, "\"" + value + "\""};
  };
  SUBCASE("no duration") { set("WARMPROXY_IDLE_STOP", "soon"); }
  SUBCASE("a duration without a unit") { set("WARMPROXY_STOP_TIMEOUT", "10"); }
  SUBCASE("an empty duration") { set("WARMPROXY_STARTUP_TIMEOUT", ""); }
  SUBCASE("no time to start") { set("WARMPROXY_STARTUP_TIMEOUT", "0s"); }
  SUBCASE("no port") { set("PORT", "http"); }
  SUBCASE("a port that is too large") { set("WARMPROXY_TARGET_PORT", "65536"); }
  SUBCASE("no number") { set("WARMPROXY_MAX_CONNECTIONS", "-1"); }
  SUBCASE("no connections") { set("WARMPROXY_MAX_CONNECTIONS", "0"); }
  SUBCASE("neither yes nor no") { set("WARMPROXY_PREWARM", "perhaps"); }
  SUBCASE("an open quote") { set("WARMPROXY_ARGS", "a 'b"); }
  SUBCASE("no path") { set("WARMPROXY_HEALTH_PATH", "health"); }
  SUBCASE("no origin") { set("WARMPROXY_CORS_ORIGINS", "example.org"); }
  SUBCASE("a value of several lines") {
    environment["PORT"] = "30\n00";
    expected = {"PORT=\"30?00\""};
  }
  SUBCASE("a missing directory") {
    set("WARMPROXY_DIRECTORY", directory / "missing");
    expected.push_back("No such file or directory");
  }
  SUBCASE("a directory that is a file") {
    write_file(directory / "file", "");
    set("WARMPROXY_DIRECTORY", directory / "file");
    expected.push_back("Not a directory");
  }
  SUBCASE("{port} when the program chooses its port") {
    environment["WARMPROXY_TARGET_PORT"] = "auto";
    environment["WARMPROXY_ARGS"] = "--port {port}";
    expected = {"WARMPROXY_TARGET_PORT", "{port}"};
  }
  SUBCASE("the target's port is our own") {
    const auto port = std::to_string(free_port());
    environment["WARMPROXY_TARGET_PORT"] = environment["PORT"] = port;
    expected = {"WARMPROXY_TARGET_PORT", "PORT"};
  }
  ServeProcess serve(environment, false);
  CHECK(serve.wait() == 2);
  const auto printed = serve.err();
  CHECK(printed.substr(0, 12) == "[warmproxy] ");
  CHECK(count_lines(printed) == 1);
  for (const auto &part : expected) {
    CHECK_MESSAGE(contains(printed, part), printed);
  }
  CHECK(serve.out() == "");
  CHECK(read_file(starts) == "");
}

TEST_CASE("serve: a program that cannot be run is one line, and status 2") {
  TemporaryDirectory directory;
  std::string binary, expected;
  SUBCASE("none") { expected = "Options::binary"; }
  SUBCASE("missing") { binary = expected = directory / "missing"; }
  SUBCASE("missing from PATH") { binary = expected = "no-such-program"; }
  SUBCASE("not executable") {
    binary = expected = directory / "text";
    write_file(binary, "#!/bin/sh\n");
  }
  SUBCASE("a directory") { binary = expected = directory.path(); }
  SUBCASE("a name of several lines") {
    binary = "./no\nsuch\033[31mprogram";
    expected = "./no?such?[31mprogram";
  }
  ServeProcess serve({{"WARMPROXY_BINARY", binary}}, false);
  CHECK(serve.wait() == 2);
  const auto printed = serve.err();
  CHECK(count_lines(printed) == 1);
  CHECK_MESSAGE(contains(printed, expected), printed);
  CHECK_MESSAGE(contains(printed, "WARMPROXY_BINARY"), printed);
}

TEST_CASE("serve: an address that cannot be bound is one line, and status 1") {
  ScriptedTarget taken(answering(ok()));
  std::unique_ptr<ServeProcess> other;
  TemporaryDirectory directory;
  auto environment = serve_fake({"--count-file", directory / "starts"});
  environment["WARMPROXY_PREWARM"] = "1";
  environment["HOST"] = "127.0.0.1";
  environment["PORT"] = std::to_string(taken.port());
  std::string reason = "Address already in use";
  SUBCASE("the port is in use") {}
  SUBCASE("the port is in use, all addresses") {
    environment["HOST"] = "0.0.0.0";
  }
  SUBCASE("the port is in use by another warmproxy") {
    other = std::make_unique<ServeProcess>(serve_fake());
    environment["PORT"] = std::to_string(other->port());
  }
  SUBCASE("another machine's address") { // RFC 5737
    environment["HOST"] = "203.0.113.1";
    reason = "Cannot assign requested address";
  }
  SUBCASE("another machine's address, any port") {
    environment["HOST"] = "203.0.113.1";
    environment["PORT"] = "0";
    reason = "Cannot assign requested address";
  }
  // The resolver chooses the reason.
  SUBCASE("no address") {
    environment["HOST"] = "256.256.256.256";
    reason = "";
  }
  ServeProcess serve(environment, false);
  CHECK(serve.wait() == 1);
  const auto printed = serve.err();
  CHECK(count_lines(printed) == 1);
  CHECK_MESSAGE(contains(printed, "cannot listen on " + environment["HOST"] +
                                      ":" + environment["PORT"] + ": "),
                printed);
  CHECK_MESSAGE(contains(printed, reason), printed);
  CHECK_MESSAGE(!contains(printed, "Success"), printed);
  CHECK(read_file(directory / "starts") == "");
}

// Sanitizers need descriptors and threads themselves.
TEST_CASE("serve: too few descriptors at the start are one line, and status 1" *
          doctest::skip(sanitized)) {
  for (int limit = 4; limit <= 14; ++limit) {
    CAPTURE(limit);
    Script serve("ulimit -n " + std::to_string(limit) + "; exec \"$@\"",
                 serve_fake());
    REQUIRE(wait_for([&] {
      return !serve.running() || contains(serve.err(), "listening on");
    }));
    if (serve.running()) { // enough
      serve.signal(SIGTERM);
      CHECK(serve.wait() == 0);
      continue;
    }
    CHECK(serve.wait() == 1);
    const auto printed = serve.err();
    CHECK_MESSAGE(count_lines(printed) == 1, printed);
    CHECK_MESSAGE(contains(printed, "Too many open files"), printed);
  }
}

TEST_CASE("serve: no thread or process at the start is one line, and status 1" *
          doctest::skip(sanitized)) {
  if (getuid() != 0 || !can("prlimit --nproc=1 " + someone + "true")) {
    return;
  }
  ForAnyUser files;
  Script serve("exec prlimit --nproc=1 " + someone + "\"$@\"", files.served(),
               files / "warmproxy");
  CHECK(serve.wait() == 1);
  const auto printed = serve.err();
  CHECK_MESSAGE(count_lines(printed) == 1, printed);
  CHECK_MESSAGE(contains(printed, "cannot start: "), printed);
  CHECK_MESSAGE(contains(printed, "Resource temporarily unavailable"), printed);
}

// ---- surroundings -----------------------------------------------------------

TEST_CASE("serve: works with descriptors 0 to 2 closed") {
  for (const std::string closed : {"0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"}) {
    CAPTURE(closed);
    Within proxy("exec \"$@\" " + closed, serve_fake());
    const auto target =
        static_cast<pid_t>(std::atol(get(proxy.port(), "/pid").body.c_str()));
    for (int fd = 0; fd < 3; ++fd) {
      CAPTURE(fd);
      if (contains(closed, std::to_string(fd) + (fd ? ">" : "<"))) {
        CHECK(descriptor(proxy.pid(), fd) == "/dev/null");
        CHECK(descriptor(target, fd) == "/dev/null");
      }
    }
    proxy.signal(SIGTERM);
    CHECK(proxy.wait() == 0);
  }
}

TEST_CASE("serve: learns how the target ended though SIGCHLD was ignored") {
  const std::string ignoring = "env --ignore-signal=CHLD ";
  if (!can(ignoring + "true")) { return; }
  Within proxy("exec " + ignoring + "\"$@\"", serve_fake());
  CHECK(get(proxy.port(), "/pid").status == 200);
  get(proxy.port(), "/crash");
  CHECK(wait_for([&] { return last_exit(proxy.port()) != ""; }));
  CHECK(last_exit(proxy.port()) == "exited with status 7");
}

TEST_CASE("serve: a full stderr holds up nothing") {
  TemporaryDirectory directory;
  const auto fifo = directory / "fifo";
  REQUIRE(mkfifo(fifo.c_str(), 0600) == 0);
  const int fd = open(fifo.c_str(), O_RDWR | O_NONBLOCK | O_CLOEXEC);
  REQUIRE(fd >= 0);
  const auto fill = [fd] {
    const std::string block(4096, 'x');
    while (write(fd, block.data(), block.size()) > 0) {}
    while (write(fd, "x", 1) > 0) {}
  };
  fill();
  auto environment = serve_fake();
  environment["WARMPROXY_IDLE_STOP"] = "1ms"; // logs with every start and stop
  Within proxy("exec \"$@\" 2>'" + fifo + "'", environment);
  for (int i = 0; i < 3; ++i) {
    CHECK(get(proxy.port(), "/pid").status == 200);
  }
  std::string printed;
  SUBCASE("and what was dropped is counted") {
    char block[65536];
    while (read(fd, block, sizeof(block)) > 0) {}
    CHECK(wait_for([&] {
      get(proxy.port(), "/pid");
      const auto n = read(fd, block, sizeof(block));
      printed.append(block, n > 0 ? static_cast<std::size_t>(n) : 0);
      return contains(printed, " log lines dropped: stderr was full\n");
    }));
  }
  SUBCASE("nor a signal") {}
  fill();
  proxy.signal(SIGTERM);
  CHECK(proxy.wait() == 0);
  close(fd);
}

TEST_CASE("serve: a stderr that nobody reads ends nothing") {
  TemporaryDirectory directory;
  const auto fifo = directory / "fifo";
  REQUIRE(mkfifo(fifo.c_str(), 0600) == 0);
  auto environment = serve_fake();
  environment["WARMPROXY_TYPO"] = "1"; // the first line of the log
  // Descriptor 3 is the only reader, until it is closed.
  Within proxy("exec \"$@\" 3<>'" + fifo + "' 2>'" + fifo + "' 3<&-",
               environment);
  CHECK(get(proxy.port(), "/pid").status == 200);
  proxy.signal(SIGTERM);
  CHECK(proxy.wait() == 0);
}

TEST_CASE("serve: an empty HOST and * are all IPv4 addresses") {
  for (const std::string host : {"", "*", "0.0.0.0"}) {
    CAPTURE(host);
    auto environment = serve_fake();
    environment["HOST"] = host;
    ServeProcess serve(environment);
    CHECK(RawClient(serve.port(), "127.0.0.2").get("/pid").status == 200);
  }
}

TEST_CASE("serve: nothing is started before there is a request") {
  TemporaryDirectory directory;
  ServeProcess serve(serve_fake({"--count-file", directory / "starts"}));
  RawClient silent(serve.port());
  CHECK(exchange(serve.port(), "GET / HTTP/1.1\r\n\r\n").status == 400);
  CHECK(read_file(directory / "starts") == "");
  CHECK(get(serve.port()).status == 200);
  CHECK(count_lines(read_file(directory / "starts")) == 1);
}

TEST_CASE("serve: logs the port that it was given") {
  auto environment = serve_fake();
  environment["PORT"] = "0";
  ServeProcess serve(environment, false);
  const std::string before = "listening on 127.0.0.1:";
  REQUIRE(serve.printed(before));
  const auto printed = serve.err();
  const auto port =
      std::atoi(printed.c_str() + printed.find(before) + before.size());
  CHECK(get(port).status == 200);
}

TEST_CASE("serve: logs the target's life, one line for each event") {
  auto environment = serve_fake();
  environment["WARMPROXY_IDLE_STOP"] = "50ms";
  ServeProcess serve(environment);
  const auto pid = get(serve.port(), "/pid").body;
  CHECK(serve.printed("target up in "));
  CHECK(serve.printed("(pid " + pid.substr(0, pid.size() - 1) + ", port "));
  CHECK(serve.printed("0.05 s"));
  for (const auto &line : lines_of(serve.err())) {
    CHECK_MESSAGE(line.substr(0, 12) == "[warmproxy] ", line);
  }
  serve.signal(SIGTERM);
  CHECK(serve.wait() == 0);
  CHECK(serve.out() == "");
}

TEST_CASE("serve: an unknown WARMPROXY_ variable is a warning") {
  auto environment = serve_fake();
  environment["WARMPROXY_IDLE_TIMEOUT"] = "5m";
  environment["WARMPROXY_SERVICE_HOST"] = "10.0.0.1";
  environment["WARMPROXY_PORT_80_TCP"] = "tcp://10.0.0.1:80";
  ServeProcess serve(environment);
  CHECK(serve.printed("listening on"));
  const auto lines = lines_of(serve.err());
  REQUIRE(lines.size() == 2);
  CHECK(contains(lines[0], "WARMPROXY_IDLE_TIMEOUT is not a setting"));
}

TEST_CASE("serve: where the program is looked for") {
  namespace fs = std::filesystem;
  TemporaryDirectory directory;
  const auto here = directory / "here", there = directory / "there";
  fs::create_directories(here + "/bin");
  fs::create_directories(there + "/bin");
  fs::copy_file(built("warmproxy"), there + "/warmproxy");
  fs::copy_file(built("fake"), there + "/bin/fake");
  Environment environment = {{"HOST", "127.0.0.1"},
                             {"PORT", std::to_string(free_port())},
                             {"PATH", here + "/bin"}};
  std::vector<std::string> args;
  auto expected = here + "/bin/fake";
  bool also_here = true;
  SUBCASE("from the current directory") {
    environment["WARMPROXY_BINARY"] = "bin/fake";
  }
  SUBCASE("then beside this executable") {
    environment["WARMPROXY_BINARY"] = "bin/fake";
    also_here = false;
    expected = there + "/bin/fake";
  }
  SUBCASE("on PATH, without a slash") {
    environment["WARMPROXY_BINARY"] = "fake";
  }
  SUBCASE("as a command") { args = {"bin/fake", "--port", "{port}"}; }
  SUBCASE("as a command behind --") {
    args = {"--", "fake", "--port", "{port}"};
  }
  if (also_here) { fs::copy_file(built("fake"), expected); }
  Process serve(there + "/warmproxy", args, environment, here);
  const auto port = std::atoi(environment["PORT"].c_str());
  REQUIRE(wait_for([&] { return listening(port) || !serve.running(); }));
  CHECK(serve.err() != "");
  CHECK(executable(get(port, "/pid").body) == expected);
}

// ---- PID 1 ------------------------------------------------------------------

TEST_CASE("serve: as PID 1 it reaps the orphans of a living target") {
  if (!can(alone + "true")) { return; }
  auto environment = serve_fake();
  environment["WARMPROXY_BINARY"] = "/bin/sh";
  environment["WARMPROXY_ARGS"] =
      "-c 'for i in 1 2 3 4 5 6 7 8 9 10; do (true & true & exec true); done; "
      "exec " +
      built("fake") + "'";
  Within proxy("exec " + alone + "\"$@\"", environment);
  const auto first = only_child(proxy.pid());
  CHECK(get(proxy.port(), "/pid").status == 200);
  CHECK(wait_for([&] { return zombies_of(first) == 0; }));
  // The target's own status is left to its owner.
  get(proxy.port(), "/crash");
  CHECK(wait_for([&] { return get(proxy.port(), "/pid").status == 200; }));
  CHECK(last_exit(proxy.port()) == "exited with status 7");
  CHECK(wait_for([&] { return zombies_of(first) == 0; }));
  kill(first, SIGTERM);
  CHECK(proxy.wait() == 0);
}

TEST_CASE("serve: as PID 1 it goes on reaping while it stops") {
  if (!can(alone + "true")) { return; }
  TemporaryDirectory directory;
  auto environment = serve_fake();
  environment["WARMPROXY_STOP_TIMEOUT"] = "10m";
  environment["WARMPROXY_BINARY"] = "/bin/sh";
  environment["WARMPROXY_ARGS"] =
      "-c '(while ! test -e " + (directory / "gate") +
      "; do sleep 0.01; done; true & true) & exec " + built("fake") +
      " --ignore-term'";
  Within proxy("exec " + alone + "\"$@\"", environment);
  const auto first = only_child(proxy.pid());
  CHECK(get(proxy.port(), "/pid").status == 200);
  kill(first, SIGTERM);
  CHECK(proxy.printed("stopping"));
  write_file(directory / "gate", "");
  CHECK(wait_for([&] { return zombies_of(first) == 0; }));
  // The second signal ends it at once.
  CHECK(wait_for([&] {
    kill(first, SIGINT);
    return !proxy.running();
  }));
  CHECK(proxy.wait() == 128 + SIGINT);
}

// ---- a Proxy within a program -----------------------------------------------

TEST_CASE("proxy: a log function that throws is survived") {
  auto options = fake_target();
  options.log = [](std::string_view) { throw std::runtime_error("full"); };
  RunningProxy proxy(options);
  CHECK(get(proxy.port()).status == 200);
  CHECK(proxy.stop());
}

TEST_CASE("proxy: it listens once") {
  ScriptedTarget target(answering(ok()));
  RunningProxy proxy(attached(target));
  CHECK(get(proxy.port()).status == 200);
  const auto refused = [&] {
    CHECK(!proxy.proxy().listen("127.0.0.1", 0));
    CHECK(!proxy.proxy().listen_after_bind());
    CHECK(proxy.proxy().bind_to_any_port("127.0.0.1") == -1);
    CHECK_THROWS_AS(proxy.proxy().routes("/own"), std::logic_error);
    CHECK_THROWS_AS(
        proxy.proxy().set_pre_routing_handler([](const auto &, auto &) {
          return httplib::Server::HandlerResponse::Unhandled;
        }),
        std::logic_error);
  };
  refused();
  CHECK(get(proxy.port()).status == 200); // undisturbed
  CHECK(proxy.stop());
  refused();
}

TEST_CASE("proxy: one that was stopped stays stopped") {
  ScriptedTarget target(answering(ok()));
  warmproxy::Proxy proxy(attached(target));
  proxy.stop();
  CHECK(proxy.bind_to_any_port("127.0.0.1") > 0);
  CHECK(proxy.listen_after_bind());
  CHECK(target.requests().empty());
}

TEST_CASE("proxy: one that was not bound does not serve") {
  ScriptedTarget target(answering(ok()));
  warmproxy::Proxy proxy(attached(target));
  CHECK(!proxy.listen_after_bind());
}

TEST_CASE("proxy: the destructor waits for a thread that listens") {
  for (int round = 0; round < 10; ++round) {
    auto options = fake_target();
    options.log = [](std::string_view) {};
    auto proxy = std::make_unique<warmproxy::Proxy>(options);
    const auto port = proxy->bind_to_any_port("127.0.0.1");
    REQUIRE(port > 0);
    bool drained = false;
    std::thread thread(
        [&, raw = proxy.get()] { drained = raw->listen_after_bind(); });
    const auto pid = get(port, "/pid").body;
    if (round % 2) { proxy->stop(); }
    proxy.reset();
    thread.join();
    CHECK(drained);
    CHECK(kill(static_cast<pid_t>(std::atol(pid.c_str())), 0) != 0);
  }
}

TEST_CASE("proxy: a forked child of the program holds up no destructor") {
  auto proxy = std::make_unique<RunningProxy>(fake_target());
  CHECK(get(proxy->port()).status == 200);
  const auto child = fork(); // it has our descriptors, and keeps them
  if (child == 0) {
    for (;;) {
      pause();
    }
  }
  REQUIRE(child > 0);
  std::atomic<bool> destroyed{false};
  std::thread thread([&] {
    proxy.reset();
    destroyed = true;
  });
  CHECK(wait_for([&] { return destroyed.load(); }));
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  thread.join();
}

TEST_CASE("proxy: milliseconds::max() means never") {
  auto options = fake_target();
  options.startup_timeout = options.stop_timeout = Milliseconds::max();
  options.idle_stop = options.keep_alive_timeout = Milliseconds::max();
  options.waiting_page_after = options.background_work = Milliseconds::max();
  options.cdn_cache = std::chrono::seconds::max();
  RunningProxy proxy(options);
  RawClient client(proxy.port());
  const auto pid = client.get("/pid").body;
  CHECK(pid != "");
  CHECK(client.get("/pid", "Sec-Fetch-Dest: document\r\n").body == pid);
  client.close();
  CHECK(proxy.stop());
}
