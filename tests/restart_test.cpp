// Targets that die while they serve: the restart, and what becomes of requests.

#include "figures.hpp"

#include <set>

using namespace support;

namespace {

const int kills = in_full ? 60 : 10;
const Milliseconds between_kills{in_full ? 1000 : 500};
const std::size_t clients = 32;

// Calls `request(client, number, connection)` in a thread a client, over and
// over, while the target is killed again and again.
template <class Request>
void under_kills(RunningProxy &proxy, Request request) {
  REQUIRE(get(proxy.port()).status == 200);
  std::atomic<bool> over{false};
  std::vector<std::thread> threads;
  for (std::size_t client = 0; client < clients; ++client) {
    threads.emplace_back([&, client] {
      auto connection = std::make_unique<RawClient>(proxy.port());
      for (std::size_t number = 0; !over; ++number) {
        if (!request(client, number, *connection)) {
          connection = std::make_unique<RawClient>(proxy.port());
        }
      }
    });
  }
  auto next = Clock::now();
  pid_t killed = 0;
  for (int i = 0; i < kills; ++i) {
    next += between_kills;
    // A second death within 250 ms would not be restarted at once.
    CHECK(wait_for([&] {
      const auto status = proxy.status();
      const auto pid = static_cast<pid_t>(status.pid);
      if (Clock::now() < next || status.up_for < Milliseconds(300) ||
          pid <= 0 || pid == killed) {
        return false;
      }
      killed = pid;
      return kill(killed, SIGKILL) == 0;
    }));
  }
  CHECK(wait_for([&] {
    const auto status = proxy.status();
    return status.state == "up" &&
           status.starts == static_cast<std::uint64_t>(kills) + 1;
  }));
  over = true;
  for (auto &thread : threads) {
    thread.join();
  }
}

std::string described(const Response &response) {
  return response.status == 0 ? "nothing"
                              : response.head + response.body +
                                    (response.complete ? "" : "[cut]");
}

} // namespace

// As somebody else restarts it: it may wait until its connections are closed,
// which only we can do.
TEST_CASE("restart: a target that shuts itself down is not kept from it") {
  RunningProxy proxy(fake_target({"--polite"}));
  RawClient first(proxy.port()), second(proxy.port()), slow(proxy.port());
  CHECK(first.post("/echo", "x").status == 200); // it is private from now on
  SUBCASE("by connections that are idle") {}
  SUBCASE("by a connection that becomes idle later") {
    slow.send("GET /slow?ms=1000 HTTP/1.1\r\nHost: test\r\n\r\n");
    CHECK(wait_for([&] { return proxy.status().in_flight == 1; }));
  }
  const auto pid = static_cast<pid_t>(proxy.status().pid);
  CHECK(kill(pid, SIGTERM) == 0);
  CHECK(wait_for([&] { return !listening(proxy.status().port); }));
  second.send("GET /pid HTTP/1.1\r\nHost: test\r\n\r\n");
  // Long before the idle connection would be closed anyway.
  CHECK(second.read_response(false, Milliseconds(10000)).status == 200);
  CHECK(proxy.status().pid != pid);
}

TEST_CASE("restart: no GET is lost when the target is killed every second") {
  RunningProxy proxy(fake_target());
  std::atomic<std::uint64_t> served{0}, failed{0}, waited{0};
  std::mutex mutex;
  std::string first_failure;
  under_kills(proxy, [&](std::size_t, std::size_t, RawClient &connection) {
    std::string instead;
    try {
      const auto response = connection.get("/pid");
      if (response.status == 200 && response.complete &&
          std::atol(response.body.c_str()) > 0) {
        ++served;
        if (response.count("Server-Timing")) { ++waited; }
        return true;
      }
      instead = described(response);
    } catch (const Error &error) { instead = error.what(); }
    const std::lock_guard<std::mutex> lock(mutex);
    if (failed++ == 0) { first_failure = instead; }
    return false;
  });
  MESSAGE(served.load(), " GETs served, ", waited.load(),
          " of them after a wait, ", failed.load(), " failed, ", kills,
          " kills, ", proxy.status().starts, " starts");
  CHECK(failed == 0);
  CHECK(first_failure == "");
  CHECK(served > clients * static_cast<std::size_t>(kills));
  CHECK(waited >= static_cast<std::size_t>(kills));
}

TEST_CASE(
    "restart: no POST arrives twice when the target is killed every second") {
  TemporaryDirectory directory;
  const auto posts = directory / "posts", starts = directory / "starts";
  RunningProxy proxy(
      fake_target({"--posts-file", posts, "--count-file", starts}));
  std::mutex mutex;
  std::set<std::string> served, refused, cut;
  std::string other;
  under_kills(proxy, [&](std::size_t client, std::size_t number,
                         RawClient &connection) {
    const auto id = std::to_string(client) + "-" + std::to_string(number);
    Response response;
    std::string error;
    try {
      response = connection.post("/", id);
    } catch (const Error &e) { error = e.what(); }
    const std::lock_guard<std::mutex> lock(mutex);
    if (response.status == 200 && response.complete) {
      served.insert(id);
    } else if (response.status == 502) {
      refused.insert(id);
    } else if (error.empty() && !response.complete) {
      cut.insert(id);
    } else if (other.empty()) {
      other = error + described(response);
    }
    return response.complete && response.header("Connection") != "close";
  });

  // The target writes a line of the body before it responds.
  std::map<std::string, int> arrived;
  for (const auto &id : lines_of(read_file(posts))) {
    ++arrived[id];
  }
  std::size_t twice = 0, lost = 0;
  for (const auto &a : arrived) {
    if (a.second > 1) { ++twice; }
  }
  for (const auto &id : served) {
    if (arrived[id] == 0) { ++lost; }
  }
  MESSAGE(served.size(), " POSTs served, ", refused.size(), " answered 502, ",
          cut.size(), " cut, ", twice, " sent twice, ", kills, " kills, ",
          lines_of(read_file(starts)).size(), " starts");
  CHECK(other == "");
  CHECK(twice == 0);
  CHECK(lost == 0);
  CHECK(served.size() > clients * static_cast<std::size_t>(kills));
  // Little more than what was with the target when it died: the kernel closes
  // its listening socket last, so that some still get in on it meanwhile.
  CHECK(refused.size() + cut.size() <=
        3 * clients * static_cast<std::size_t>(kills));
  CHECK(lines_of(read_file(starts)).size() ==
        static_cast<std::size_t>(kills) + 1);
}

TEST_CASE("restart: a request that kills the target is not repeated forever") {
  TemporaryDirectory directory;
  const auto starts = directory / "starts";
  RunningProxy proxy(fake_target({"--count-file", starts}));
  SUBCASE("before its response") {
    const auto response = get(proxy.port(), "/crash");
    CHECK((response.status == 502 || response.status == 503));
    CHECK(response.body.find("warmproxy: ") == 0);
  }
  SUBCASE("before its response, with a method that is not repeated") {
    CHECK(RawClient(proxy.port()).post("/crash", "x").status == 502);
    CHECK(lines_of(read_file(starts)).size() == 1);
  }
  SUBCASE("within its response") {
    RawClient client(proxy.port());
    client.send("GET /crash-mid HTTP/1.1\r\nHost: test\r\n\r\n");
    const auto response = client.read_response();
    CHECK(response.status == 200);
    CHECK(!response.complete);
    CHECK(lines_of(read_file(starts)).size() == 1);
  }
  CHECK(lines_of(read_file(starts)).size() <= 3);
  CHECK(proxy.logged("exited with status 7"));
  CHECK(wait_for([&] { return get(proxy.port(), "/pid").status == 200; }));
}

TEST_CASE("restart: a target that goes to the background gets a hint") {
  TemporaryDirectory directory;
  const auto gate = directory / "gate";
  const std::string until_gate = "while ! test -e \"$0\"; do sleep 0.01; done";
  warmproxy::Options options;
  options.binary = "/bin/sh";
  bool hinted = false;
  SUBCASE("when it has left its server behind") {
    options.args = {"-c", "\"$1\" & " + until_gate, gate, built("fake")};
    hinted = true;
  }
  SUBCASE("and none when it has left nothing") {
    options.args = {"-c", "\"$1\" & " + until_gate + "; kill $!; wait; exit 0",
                    gate, built("fake")};
  }
  options.stop_timeout = Milliseconds(2000);
  RunningProxy proxy(options);
  CHECK(get(proxy.port(), "/pid").status == 200);
  write_file(gate, "");
  CHECK(proxy.logged("the next request starts it again"));
  for (const auto &line : proxy.log_lines()) {
    if (line.find("starts it again") == std::string::npos) { continue; }
    CAPTURE(line);
    CHECK(line.find("target exited with status 0 after ") == 0);
    CHECK(hinted ==
          (line.find(" (it must stay in the foreground") != std::string::npos));
  }
}

TEST_CASE("restart: a good start resets the back-off") {
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

TEST_CASE("restart: one early exit delays no start") {
  RunningProxy proxy(fake_target());
  CHECK(RawClient(proxy.port()).post("/crash", "x").status == 502);
  CHECK(get(proxy.port(), "/pid").status == 200);
  CHECK(proxy.status().starts == 2);
}

TEST_CASE("restart: what a crashed target left holds up no start") {
  auto options = fake_target({"--fork-worker"}); // which ignores SIGTERM
  options.stop_timeout = std::chrono::minutes(10);
  RunningProxy proxy(options);
  CHECK(RawClient(proxy.port()).post("/crash", "x").status == 502);
  CHECK(get(proxy.port(), "/pid").status == 200);
  const auto group = proxy.status().pid;
  REQUIRE(group > 1);
  kill(static_cast<pid_t>(-group), SIGKILL); // or stopping takes as long
}

TEST_CASE("restart: a request during a pause learns why, and how long it is") {
  const auto refused_with = [](RunningProxy &proxy, const std::string &reason,
                               const std::string &retry_after) {
    return wait_for([&] {
      const auto response = get(proxy.port(), "/pid");
      return response.body == "warmproxy: " + reason + "\n" &&
             response.header("Retry-After") == retry_after;
    });
  };
  SUBCASE("after an exit") {
    RunningProxy proxy(fake_target({"--exit-after", "150", "7"}));
    CHECK(refused_with(
        proxy, "the target exited with status 7; try again in a moment", "1"));
  }
  SUBCASE("after a start that failed") {
    auto options = fake_target({"--never-listen"});
    options.startup_timeout = options.stop_timeout = Milliseconds(50);
    RunningProxy proxy(options);
    const std::string reason = "target not ready after 0.05 s (last probe: "
                               "connection refused); see "
                               "WARMPROXY_STARTUP_TIMEOUT";
    CHECK(refused_with(proxy, reason, "2"));
    CHECK(refused_with(proxy, reason + "; try again in a moment", "4"));
  }
}

TEST_CASE("restart: back-off limits a crash loop") {
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
  MESSAGE(count, " starts, ", allowed, " allowed; ", told.load(), " responses");
  CHECK(count <= allowed);
  CHECK(count >= 2);
  CHECK(odd == 0);
}
