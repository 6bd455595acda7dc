// Many clients, and slow ones: they neither hinder others nor cost much.

#include "load.hpp"

using namespace support;

TEST_CASE("load: many idle connections beside busy ones") {
  const std::size_t count = in_full ? 1000 : 200;
  REQUIRE(room_for(count + 200));
  Watched proxy(served());
  const auto before = at_rest(proxy);
  const int rounds = in_full ? 5 : 2;
  Figures first{};
  for (int round = 0; round < rounds; ++round) {
    std::list<RawClient> idle;
    for (std::size_t i = 0; i < count; ++i) {
      idle.emplace_back(proxy.port());
      // Half of them have never said anything.
      if (i % 2 == 0) { CHECK(idle.back().get("/pid").status == 200); }
    }
    CHECK(wait_for([&] {
      return proxy.number("connections") == static_cast<long>(count) + 1;
    }));
    CHECK(proxy.reaches("cold"));
    const auto with = proxy.figures();
    CHECK(with.fds == before.fds + count);
    CHECK(with.threads == before.threads);
    if (round == 0) {
      MESSAGE("an idle connection costs ",
              static_cast<double>(with.rss - before.rss) /
                  static_cast<double>(count),
              " kB and a descriptor (", count,
              " of them: ", with.rss - before.rss, " kB more than ", before.rss,
              " kB)");
    }
    CHECK(busy(proxy.port(), 50, in_full ? 200 : 20));
    // The idle ones are still good.
    for (auto &client : idle) {
      CHECK(client.get("/pid").status == 200);
    }
    idle.clear();
    CHECK(proxy.alone());
    CHECK(proxy.reaches("cold"));
    CHECK(proxy.comes_back_to(before));
    if (round == 0) { first = proxy.figures(); }
  }
  const auto after = proxy.figures();
  MESSAGE("resident before ", before.rss, " kB, after one round ", first.rss,
          " kB, after ", rounds, " rounds ", after.rss, " kB");
  if (!sanitized) { CHECK(after.rss < first.rss + 4096); }
}

TEST_CASE("load: slow request heads do not hinder others") {
  Watched proxy(served());
  const auto before = at_rest(proxy);
  {
    std::list<RawClient> slow;
    for (int i = 0; i < 100; ++i) {
      slow.emplace_back(proxy.port());
      slow.back().send(get_pid.substr(
          0, static_cast<std::size_t>(i) % (get_pid.size() - 1) + 1));
    }
    CHECK(busy(proxy.port(), 20, 20));
    int i = 0;
    for (auto &client : slow) {
      const auto sent = static_cast<std::size_t>(i) % (get_pid.size() - 1) + 1;
      if (i++ % 2 == 0) {
        client.send(get_pid.substr(sent));
        CHECK(client.read_response().status == 200);
      }
    }
  }
  CHECK(proxy.alone());
  CHECK(proxy.reaches("cold"));
  CHECK(proxy.comes_back_to(before));
}

TEST_CASE("load: slow readers neither hinder others nor fill memory") {
  const std::uint64_t size = 32u << 20;
  Watched proxy(served());
  const auto before = at_rest(proxy);
  const long readers = in_full ? 200 : 40;
  std::list<RawClient> slow;
  for (long i = 0; i < readers; ++i) {
    slow.emplace_back(proxy.port());
    slow.back().send("GET /bytes?n=" + std::to_string(size) +
                     " HTTP/1.1\r\nHost: test\r\n\r\n");
    CHECK(slow.back().read_response_head().status == 200);
  }
  CHECK(proxy.number("in_flight") == readers);
  CHECK(busy(proxy.port(), 20, 20));
  CHECK(rests(proxy.pid()));
  const auto with = proxy.figures();
  MESSAGE("a slow reader costs ",
          static_cast<double>(with.rss - before.rss) /
              static_cast<double>(readers),
          " kB");
  // One block a direction, a stack, and what the allocator makes of it.
  if (!sanitized) { CHECK(with.rss < before.rss + 256 * readers); }
  // They can still have all of it.
  CHECK(slow.front().verify_generated(size) == size);
  CHECK(slow.front().get("/pid").status == 200);
  slow.clear();
  CHECK(proxy.alone());
  CHECK(proxy.reaches("cold"));
  CHECK(proxy.comes_back_to(before));
}

TEST_CASE("load: a client that neither reads nor sends costs no CPU time") {
  const std::string large(16u << 20, 'x');
  ScriptedTarget target([&](TargetConnection &c) {
    if (c.read_head().empty()) { return; }
    c.send("HTTP/1.1 413 Too Large\r\nContent-Length: " +
           std::to_string(large.size()) + "\r\n\r\n");
    try {
      c.send(large, Milliseconds(300)); // as much as it takes
    } catch (const Error &) {}
    c.reset();
  });
  Watched proxy({{"WARMPROXY_BINARY", "/bin/false"},
                 {"WARMPROXY_TARGET_PORT", std::to_string(target.port())},
                 {"WARMPROXY_HEALTH_PATH", ""}});
  RawClient client(proxy.port());
  client.send("POST / HTTP/1.1\r\nHost: test\r\nContent-Length: 4\r\n\r\nbo");
  CHECK(wait_for([&] { return target.requests().size() == 1; }));
  CHECK(wait_for([&] { return target.open() == 0; }));
  CHECK(rests(proxy.pid()));
  client.close();
  CHECK(proxy.alone());
}
