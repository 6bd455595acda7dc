// Starts that come to nothing: what the client is told, and that the next good
// one serves.

#include "figures.hpp"

using namespace support;

namespace {

// A fake that is started with `args`, until a file exists; then it is a good
// one, on the port that it is told.
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

// The next requests find the target left alone for a moment, and then good.
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

// Listens on a port of 127.0.0.1, and no more than that.
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
    "a start that comes to nothing is told, and the next good one serves") {
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
      {"never listens", {"--never-listen"}, 504, "Connection refused"},
      {"never listens, and ignores SIGTERM",
       {"--never-listen", "--ignore-term", "--fork-worker"},
       504,
       "Connection refused"},
      {"never answers", {"--never-answer"}, 504, "no answer to GET /"},
      {"answers 503", {"--ready-after", "600000"}, 504, "GET / answered 503"},
      {"forks and leaves", {"--daemonize"}, 502, "exited with status 0"},
      {"forks and leaves, before it listens",
       {"--daemonize", "--listen-after", "600000", "--fork-worker"},
       502,
       "exited with status 0"},
      {"finds its port taken", {"--port", port}, 502, "exited with status 1"},
      {"listens elsewhere",
       {"--port", std::to_string(free_port())},
       504,
       "Connection refused"},
  };
  for (const auto &c : cases) {
    CAPTURE(c.name);
    unlink(good.c_str());
    unlink((good + ".starts").c_str());
    auto options = good_once(good, c.args);
    if (c.status == 504) { options.startup_timeout = Milliseconds(300); }
    options.stop_timeout = Milliseconds(100);
    RunningProxy proxy(options);

    // All who wait are told of the one start.
    std::list<RawClient> clients;
    for (int i = 0; i < 20; ++i) {
      clients.emplace_back(proxy.port());
      clients.back().send("GET / HTTP/1.1\r\nHost: test\r\n\r\n");
    }
    for (auto &client : clients) {
      const auto response = client.read_response();
      CAPTURE(response.head + response.body);
      // Who comes after it has failed finds it left alone for a moment.
      const bool late = response.status == 503;
      CHECK((late || response.status == c.status));
      CHECK(response.body.find("warmproxy: the target ") == 0);
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

    // A start that is under way now may still be a bad one.
    write_file(good, "");
    CHECK(wait_for([&] { return get(proxy.port(), "/pid").status == 200; }));
    CHECK(proxy.status().starts <= failed + 2);
    CHECK(proxy.status().state == "up");
  }
}

TEST_CASE("a target that is killed before it is up") {
  RunningProxy proxy(fake_target({"--never-listen"}));
  RawClient client(proxy.port());
  client.send("GET / HTTP/1.1\r\nHost: test\r\n\r\n");
  CHECK(wait_for([&] { return proxy.status().pid > 0; }));
  kill_one(proxy.status().pid);
  const auto response = client.read_response();
  CHECK(response.status == 502);
  CHECK(has(response.body, "killed by signal 9"));
}

TEST_CASE("a target that cannot be executed") {
  TemporaryDirectory directory;
  const auto program = directory / "program";
  write_file(program, "\x7f"
                      "ELF but not really");
  chmod(program.c_str(), 0755);
  warmproxy::Options options;
  options.binary = program;
  const char *reason = "Exec format error";
  SUBCASE("for what it is") {}
  SUBCASE("for its interpreter") {
    write_file(program, "#!/not/there\n");
    reason = "No such file";
  }
  SUBCASE("for its directory") {
    options = fake_target();
    options.directory = "/not/there";
    reason = "No such file";
  }
  SUBCASE("for it has gone") {
    unlink(program.c_str());
    reason = "no such program";
  }
  RunningProxy proxy(options);
  const auto response = get(proxy.port());
  CHECK(response.status == 502);
  CHECK(has(response.body, reason));
  CHECK(children_of(getpid()).size() == 1); // the guard
}

TEST_CASE("a fixed port that is taken") {
  TemporaryDirectory directory;
  auto options = fake_target({"--count-file", directory / "starts"});
  SUBCASE("by one that does not listen: the target cannot") {
    const Occupied taken(false);
    options.target_port = taken.port();
    RunningProxy proxy(options);
    const auto response = get(proxy.port());
    CHECK(response.status == 502);
    CHECK(has(response.body, "exited with status 1"));
  }
  SUBCASE("by one that does not answer: it is taken for the target") {
    const Occupied taken(true);
    options.target_port = taken.port();
    options.startup_timeout = Milliseconds(300);
    RunningProxy proxy(options);
    const auto response = get(proxy.port());
    CHECK(response.status == 504);
    CHECK(has(response.body, "no answer to GET /"));
    CHECK(read_file(directory / "starts") == "");
  }
  SUBCASE("and freed, then the target gets it") {
    auto taken = std::make_unique<Occupied>(false);
    options.target_port = taken->port();
    RunningProxy proxy(options);
    CHECK(get(proxy.port()).status == 502);
    taken.reset();
    recovers(proxy.port());
  }
}

TEST_CASE("a target that answers 503 for long is waited for") {
  auto options = fake_target({"--ready-after", in_full ? "10000" : "1000"});
  RunningProxy proxy(options);
  const auto response = get(proxy.port(), "/pid");
  CHECK(response.status == 200);
  CHECK(response.count("Server-Timing") == 1);
}

TEST_CASE("a target that logs before it listens is not held up by that") {
  const long megabytes = in_full ? 100 : 10;
  ServeProcess proxy(serve_fake({"--log-mb", std::to_string(megabytes)}));
  CHECK(get(proxy.port(), "/pid").status == 200);
  struct stat log;
  REQUIRE(stat(proc_file(proxy.pid(), "fd/2").c_str(), &log) == 0);
  CHECK(log.st_size >= megabytes << 20);
}

TEST_CASE("a good start makes up for those that failed before it") {
  TemporaryDirectory directory;
  warmproxy::Options options;
  options.binary = "/bin/sh";
  options.args = {"-c",
                  "echo >>\"$0\"; [ $(wc -l <\"$0\") -gt 4 ] || exit 3; "
                  "exec \"$1\"",
                  directory / "starts", built("fake")};
  RunningProxy proxy(options);
  CHECK(wait_for([&] { return get(proxy.port(), "/pid").status == 200; }));
  CHECK(proxy.status().starts == 5);
  // For longer than what dies as soon as it is up.
  CHECK(wait_for([&] { return proxy.status().up_for > Milliseconds(300); }));
  kill_one(proxy.status().pid);
  CHECK(get(proxy.port(), "/pid").status == 200);
}

TEST_CASE("a crash loop costs no more than the pauses allow") {
  TemporaryDirectory directory;
  const auto starts = directory / "starts";
  std::vector<std::string> args = {"--count-file", starts};
  long free = 1; // starts that no pause stands before
  SUBCASE("before it is up") { args.insert(args.end(), {"--exit-now", "1"}); }
  SUBCASE("as soon as it is up") {
    // The first one may have been chance.
    args.insert(args.end(), {"--exit-after", "50", "1"});
    free = 2;
  }
  const auto length = Milliseconds(in_full ? 30000 : 2000);
  const auto began = Clock::now();
  RunningProxy proxy(fake_target(args));
  std::vector<std::thread> threads;
  std::atomic<long> told{0}, odd{0};
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      RawClient client(proxy.port());
      wait_for(
          [&] {
            const auto response = client.get("/pid");
            const auto status = response.status;
            ++(status == 502 || status == 503 || status == 200 ? told : odd);
            return Clock::now() >= began + length;
          },
          patience + length);
    });
  }
  for (auto &thread : threads) {
    thread.join();
  }
  const auto took = Clock::now() - began;
  const auto count = static_cast<long>(lines_of(read_file(starts)).size());
  long allowed = free;
  Milliseconds sum(0), pause(100);
  while ((sum += pause) < took) {
    ++allowed;
    pause = std::min(pause * 2, Milliseconds(5000));
  }
  MESSAGE(count, " starts, ", allowed, " allowed; ", told.load(), " answers");
  CHECK(count <= allowed);
  CHECK(count >= 2);
  CHECK(odd == 0);
}

TEST_CASE("start and stop, again and again, under traffic") {
  auto environment = serve_fake({"--fork-worker"});
  environment["WARMPROXY_IDLE_STOP"] = "20ms";
  environment["WARMPROXY_STOP_TIMEOUT"] = "20ms";
  Watched proxy(environment);
  const long cycles = in_full ? 100 : 10;
  const std::size_t clients = 8;
  std::vector<std::unique_ptr<RawClient>> connections;
  for (std::size_t i = 0; i < clients; ++i) {
    connections.push_back(std::make_unique<RawClient>(proxy.port()));
  }
  std::uint64_t answered = 0;
  std::string failure;
  Figures before{};
  long first = 0;
  // The pause between two volleys is drawn out a little further each time, so
  // that they come at every moment of a stop.
  for (int volley = 0;; ++volley) {
    for (auto &client : connections) {
      client->send("GET /pid HTTP/1.1\r\nHost: test\r\n\r\n");
    }
    for (auto &client : connections) {
      const auto response = client->read_response();
      if (response.status == 200 && response.complete) {
        ++answered;
      } else {
        failure = response.head + response.body;
      }
    }
    const auto starts = proxy.number("starts");
    if (first == 0 && starts >= 3) { // it has found its size
      first = starts;
      REQUIRE(proxy.reaches("cold"));
      before = proxy.figures();
    }
    if (first > 0 && starts >= first + cycles) { break; }
    if (failure != "") { break; }
    const auto next = Clock::now() + Milliseconds(15 + volley % 30);
    wait_for([&] { return Clock::now() >= next; });
  }
  CHECK(failure == "");
  CHECK(proxy.reaches("cold"));
  CHECK(proxy.comes_back_to(before));
  const auto after = proxy.figures();
  MESSAGE(answered, " requests answered over ", proxy.number("starts"),
          " starts; resident before ", before.rss, " kB, after ", after.rss,
          " kB; ", after.fds, " descriptors, ", after.threads, " threads");
  if (!sanitized) { CHECK(after.rss < before.rss + 512); }
  CHECK(children_of(proxy.pid()).size() == 1); // the guard
}
