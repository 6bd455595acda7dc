// Failed starts: the error response, and the recovery.

#include "figures.hpp"

#include <sys/file.h>

#include <filesystem>

using namespace support;

namespace {

// Starts tests/fake.cpp with `args` until a file exists, and then without.
warmproxy::Options good_once(const std::string &file,
                             const std::vector<std::string> &args) {
  warmproxy::Options options;
  options.binary = "/bin/sh";
  options.args = {"-c",
                  "good=$1 fake=$2 count=$1.starts; shift 2; "
                  "if test -e \"$good\"; then set --; fi; "
                  "exec \"$fake\" --count-file \"$count\" \"$@\"",
                  "sh", file, built("fake")};
  options.args.insert(options.args.end(), args.begin(), args.end());
  return options;
}

// Checks that the next requests meet the back-off, and then a good start.
void recovers(int port) {
  int status = 0;
  CHECK(wait_for([&] {
    const auto response = get(port, "/pid");
    status = response.status;
    if (status == 503) { CHECK(response.header("Retry-After") != ""); }
    return status != 503;
  }));
  CHECK(status == 200);
}

bool has(const std::string &text, const std::string &part) {
  return text.find(part) != std::string::npos;
}

// Occupies a port of 127.0.0.1, listening or not.
class Occupied {
public:
  explicit Occupied(bool listening)
      : port_(free_port()),
        fd_(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    address.sin_port = htons(static_cast<std::uint16_t>(port_));
    if (bind(fd_, reinterpret_cast<sockaddr *>(&address), sizeof(address)) !=
            0 ||
        (listening && listen(fd_, 16) != 0)) {
      fail("a port to occupy");
    }
  }
  Occupied(const Occupied &) = delete;
  ~Occupied() { close(fd_); }
  int port() const { return port_; }

private:
  int port_;
  int fd_;
};

std::vector<pid_t> started(const std::string &good) {
  std::vector<pid_t> pids;
  for (const auto &line : lines_of(read_file(good + ".starts"))) {
    pids.push_back(static_cast<pid_t>(std::atol(line.c_str())));
  }
  return pids;
}

} // namespace

TEST_CASE(
    "start errors: the response says why, and the next good start serves") {
  TemporaryDirectory directory;
  const auto good = directory / "good";
  const Occupied taken(true);
  const auto port = std::to_string(taken.port());
  const struct {
    std::string name;
    std::vector<std::string> args;
    int status;
    std::string reason;
  } cases[] = {
      {"exits at once", {"--exit-now", "3"}, 502, "exited with status 3"},
      {"exits at once, content",
       {"--exit-now", "0"},
       502,
       "exited with status 0"},
      {"exits a little later",
       {"--never-listen", "--exit-after", "100", "4"},
       502,
       "exited with status 4"},
      {"never listens", {"--never-listen"}, 504, "connection refused"},
      {"never listens, and ignores SIGTERM",
       {"--never-listen", "--ignore-term", "--fork-worker"},
       504,
       "connection refused"},
      {"never responds", {"--never-answer"}, 504, "no answer to GET /"},
      {"forks and leaves", {"--daemonize"}, 502, "exited with status 0"},
      {"forks and leaves, before it listens",
       {"--daemonize", "--listen-after", "600000", "--fork-worker"},
       502,
       "exited with status 0"},
      {"finds its port taken", {"--port", port}, 502, "exited with status 1"},
      {"listens elsewhere",
       {"--port", std::to_string(free_port())},
       504,
       "connection refused"},
  };
  for (const auto &c : cases) {
    CAPTURE(c.name);
    unlink(good.c_str());
    unlink((good + ".starts").c_str());
    auto options = good_once(good, c.args);
    if (c.status == 504) { options.startup_timeout = Milliseconds(300); }
    options.stop_timeout = Milliseconds(100);
    RunningProxy proxy(options);

    // All waiting requests get the error of this start.
    std::list<RawClient> clients;
    for (int i = 0; i < 20; ++i) {
      clients.emplace_back(proxy.port());
      clients.back().send("GET / HTTP/1.1\r\nHost: test\r\n\r\n");
    }
    for (auto &client : clients) {
      const auto response = client.read_response();
      CAPTURE(response.head + response.body);
      // Requests that arrive after the failure meet the back-off.
      const bool late = response.status == 503;
      CHECK((late || response.status == c.status));
      CHECK(response.body.find("warmproxy: ") == 0);
      CHECK(lines_of(response.body).size() == 1);
      CHECK(has(response.body, c.reason));
      CHECK((response.header("Retry-After") != "") == (response.status != 502));
      CHECK(response.count("Connection") == 0);
    }
    CHECK(clients.front().get("/pid").status >= 500);
    CHECK(proxy.logged(c.reason));
    CHECK(wait_for([&] { return proxy.status().state == "cold"; }));
    for (const auto pid : started(good)) {
      CHECK(children_in_group(pid).empty());
    }
    const auto failed = proxy.status().starts;

    // A start in progress may still be a bad one.
    write_file(good, "");
    CHECK(wait_for([&] { return get(proxy.port(), "/pid").status == 200; }));
    CHECK(proxy.status().starts <= failed + 2);
    CHECK(proxy.status().state == "up");
  }
}

TEST_CASE("start errors: the target is killed before it is ready") {
  RunningProxy proxy(fake_target({"--never-listen"}));
  RawClient client(proxy.port());
  client.send("GET / HTTP/1.1\r\nHost: test\r\n\r\n");
  CHECK(wait_for([&] { return proxy.status().pid > 0; }));
  kill_one(proxy.status().pid);
  const auto response = client.read_response();
  CHECK(response.status == 502);
  CHECK(has(response.body, "killed by signal 9"));
}

TEST_CASE("start errors: the program cannot be executed") {
  TemporaryDirectory directory;
  const auto program = directory / "program";
  write_file(program, "\x7f"
                      "ELF but not really");
  chmod(program.c_str(), 0755);
  warmproxy::Options options;
  options.binary = program;
  std::string reason = "another system or processor";
  int status = 502;
  SUBCASE("for its format") {}
  SUBCASE("for its interpreter") {
    write_file(program, "#!/not/there\n");
    reason = "/not/there";
  }
  SUBCASE("for its interpreter's name with a carriage return") {
    write_file(program, "#!/bin/sh\r\n");
    reason = "carriage return";
  }
  SUBCASE("because it does not exist") {
    unlink(program.c_str());
    reason = "no such file";
  }
  int writing = -1;
  SUBCASE("because it is still being written when the time is over") {
    writing = open(program.c_str(), O_WRONLY | O_CLOEXEC);
    options.startup_timeout = Milliseconds(100);
    reason = "it took too long; see WARMPROXY_STARTUP_TIMEOUT";
    status = 504;
  }
  RunningProxy proxy(options);
  const auto response = get(proxy.port());
  CHECK(response.status == status);
  CHECK(has(response.body, reason));
  CHECK(children_of(getpid()).size() == 1); // the watchdog process
  close(writing);
}

// A release whose program is started from a scratch copy.
struct Release {
  Release() {
    mkdir(app.c_str(), 0755);
    mkdir(scratch.c_str(), 0700);
    write_file(app + "/data", "x");
  }
  Environment served() const {
    auto environment = serve_fake();
    environment["WARMPROXY_DIRECTORY"] = app;
    environment["WARMPROXY_SCRATCH"] = scratch;
    return environment;
  }
  TemporaryDirectory directory;
  const std::string app = directory / "app", scratch = directory / "scratch";
};

TEST_CASE("start errors: somebody's lock on the scratch folder") {
  Release release;
  const int lock = open(release.scratch.c_str(), O_RDONLY | O_CLOEXEC);
  REQUIRE(flock(lock, LOCK_EX) == 0);
  auto environment = release.served();
  SUBCASE("ends the start at startup_timeout") {
    environment["WARMPROXY_STARTUP_TIMEOUT"] = "200ms";
    ServeProcess proxy(environment);
    const auto response = get(proxy.port());
    CHECK(response.status >= 502);
    CHECK(has(response.body, "see WARMPROXY_STARTUP_TIMEOUT"));
    flock(lock, LOCK_UN);
    recovers(proxy.port());
  }
  SUBCASE("does not keep SIGTERM away") {
    environment["WARMPROXY_STATUS_PATH"] = "/-/status";
    ServeProcess proxy(environment);
    RawClient client(proxy.port());
    client.send("GET / HTTP/1.1\r\nHost: test\r\n\r\n");
    CHECK(wait_for([&] {
      return has(get(proxy.port(), "/-/status").body, "\"starting\"");
    }));
    proxy.signal(SIGTERM);
    CHECK(client.read_response().status == 503);
    client.close();
    CHECK(proxy.wait() == 0);
  }
  close(lock);
}

TEST_CASE(
    "start errors: a scratch copy beyond the limit on the size of files") {
  Release release;
  write_file(release.app + "/large", std::string(1 << 20, 'x'));
  Within proxy("ulimit -f 512; exec \"$@\"", release.served());
  const auto response = get(proxy.port());
  CHECK(response.status == 502);
  CHECK(has(response.body, "File too large"));
  CHECK(proxy.printed("/large: File too large")); // with its path
  CHECK(proxy.running());
  CHECK(std::filesystem::is_empty(release.scratch));
  unlink((release.app + "/large").c_str());
  recovers(proxy.port());
}

TEST_CASE("start errors: a fixed port is taken") {
  TemporaryDirectory directory;
  auto options = fake_target({"--count-file", directory / "starts"});
  SUBCASE("by a socket that does not listen") {
    const Occupied taken(false);
    options.target_port = taken.port();
    RunningProxy proxy(options);
    const auto response = get(proxy.port());
    CHECK(response.status == 502);
    CHECK(has(response.body, "exited with status 1"));
  }
  SUBCASE("by a server that does not respond: it is taken for the target") {
    const Occupied taken(true);
    options.target_port = taken.port();
    options.startup_timeout = Milliseconds(300);
    RunningProxy proxy(options);
    const auto response = get(proxy.port());
    CHECK(response.status == 504);
    CHECK(has(response.body, "no answer to GET /"));
    CHECK(read_file(directory / "starts") == "");
  }
  SUBCASE("and freed: the target gets it") {
    auto taken = std::make_unique<Occupied>(false);
    options.target_port = taken->port();
    RunningProxy proxy(options);
    CHECK(get(proxy.port()).status == 502);
    taken.reset();
    recovers(proxy.port());
  }
}
