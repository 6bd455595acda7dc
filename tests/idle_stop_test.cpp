// Stopping the target while it is not used.

#include "figures.hpp"

using namespace support;

namespace {

std::string line_of(pid_t pid) { return std::to_string(pid) + "\n"; }

bool cold(const RunningProxy &proxy) { return proxy.status().state == "cold"; }

std::string body_of(int port, const std::string &target) {
  const auto response = get(port, target);
  CHECK(response.status == 200);
  return response.body;
}

} // namespace

TEST_CASE(
    "idle stop: the target is stopped, and started again by the next request") {
  auto options = fake_target({"--fork-worker"});
  options.idle_stop = Milliseconds(50);
  options.stop_timeout = Milliseconds(100);
  RunningProxy proxy(options);
  const auto pid = static_cast<pid_t>(std::stol(body_of(proxy.port(), "/pid")));
  CHECK(wait_for([&] { return cold(proxy); }));
  CHECK(children_in_group(pid).empty());
  CHECK(proxy.status().pid == 0);
  CHECK(proxy.status().last_exit != "");

  CHECK(body_of(proxy.port(), "/pid") != line_of(pid));
  CHECK(proxy.status().starts == 2);
}

TEST_CASE("idle stop: streams, tunnels and uploads keep the target up") {
  TemporaryDirectory directory;
  auto options = fake_target();
  options.idle_stop = Milliseconds(50);
  RunningProxy proxy(options);
  RawClient client(proxy.port());

  std::function<void()> finish;
  SUBCASE("an event stream") {
    client.send("GET /sse?n=2&gate=" + (directory / "gate") +
                " HTTP/1.1\r\nHost: test\r\n\r\n");
    client.read_until("data: 1\n\n");
    finish = [&] {
      write_file(directory / "gate", "");
      client.read_until("data: 2\n\n");
    };
  }
  SUBCASE("a tunnel") {
    client.send("GET /ws HTTP/1.1\r\nHost: test\r\nConnection: Upgrade\r\n"
                "Upgrade: echo\r\n\r\n");
    CHECK(client.read_response().status == 101);
    finish = [&] {
      client.send("still there");
      CHECK(client.read_exact(11) == "still there");
      client.shutdown_write();
      CHECK(client.at_end());
    };
  }
  SUBCASE("an upload") {
    client.send("POST /upload HTTP/1.1\r\nHost: test\r\n"
                "Content-Length: 10\r\n\r\n");
    CHECK(wait_for([&] { return proxy.status().state == "up"; }));
    finish = [&] {
      client.send_generated(10);
      CHECK(client.read_response().body == "10\n");
    };
  }
  CHECK(!wait_for([&] { return proxy.status().state != "up"; },
                  Milliseconds(400)));
  CHECK(proxy.status().in_flight == 1);
  finish();
  CHECK(wait_for([&] { return cold(proxy); }));
  CHECK(proxy.status().starts == 1);
}

TEST_CASE("idle stop: a server that was there before is not ours to stop") {
  ScriptedTarget target(answering(ok()));
  auto options = attached(target);
  options.idle_stop = Milliseconds(50);
  RunningProxy proxy(options);
  CHECK(get(proxy.port()).status == 200);
  CHECK(!wait_for([&] { return proxy.status().state != "up"; },
                  Milliseconds(300)));
  CHECK(get(proxy.port()).status == 200);
  CHECK(proxy.status().starts == 1);
}

TEST_CASE("idle stop: many cycles under load") {
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
  std::uint64_t served = 0;
  std::string failure;
  Figures before{};
  long first = 0;
  // The pause between two volleys varies, so that they arrive at every moment
  // of a stop.
  for (int volley = 0;; ++volley) {
    for (auto &client : connections) {
      client->send("GET /pid HTTP/1.1\r\nHost: test\r\n\r\n");
    }
    for (auto &client : connections) {
      const auto response = client->read_response();
      if (response.status == 200 && response.complete) {
        ++served;
      } else {
        failure = response.head + response.body;
      }
    }
    const auto starts = proxy.number("starts");
    if (first == 0 && starts >= 3) { // its memory has settled
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
  MESSAGE(served, " requests served over ", proxy.number("starts"),
          " starts; resident before ", before.rss, " kB, after ", after.rss,
          " kB; ", after.fds, " descriptors, ", after.threads, " threads");
  if (!sanitized) { CHECK(after.rss < before.rss + 512); }
  CHECK(children_of(proxy.pid()).size() == 1); // the watchdog process
}
