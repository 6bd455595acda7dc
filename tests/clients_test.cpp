// Clients that are many, slow, or gone: nobody else notices, and what they cost
// comes back.

#include "figures.hpp"

using namespace support;

namespace {

const std::string plain = "GET /pid HTTP/1.1\r\nHost: test\r\n\r\n";

Environment served(const std::string &connections = "4000") {
  auto environment = serve_fake();
  environment["WARMPROXY_MAX_CONNECTIONS"] = connections;
  // A target at rest has no kept connections: they would be counted.
  environment["WARMPROXY_IDLE_STOP"] = "100ms";
  return environment;
}

// Whether so many clients at once get so many answers each, all of them good.
bool busy(int port, int clients, int requests) {
  std::atomic<int> good{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < clients; ++i) {
    threads.emplace_back([&] {
      try {
        RawClient client(port);
        for (int n = 0; n < requests; ++n) {
          const auto response = client.get("/bytes?n=1000");
          if (response.status == 200 && response.body.size() == 1000) {
            ++good;
          }
        }
      } catch (const Error &) {}
    });
  }
  for (auto &thread : threads) {
    thread.join();
  }
  return good == clients * requests;
}

// What a proxy costs when nobody is there, once it has seen some.
Figures at_rest(Watched &proxy, int clients = 50) {
  CHECK(proxy.alone());
  const auto at_first = proxy.figures();
  CHECK(busy(proxy.port(), clients, 2));
  CHECK(proxy.alone());
  CHECK(proxy.reaches("cold"));
  CHECK(proxy.comes_back_to(at_first));
  return proxy.figures();
}

} // namespace

TEST_CASE("many idle connections beside busy ones") {
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

TEST_CASE("slow heads hinder nobody") {
  Watched proxy(served());
  const auto before = at_rest(proxy);
  {
    std::list<RawClient> slow;
    for (int i = 0; i < 100; ++i) {
      slow.emplace_back(proxy.port());
      slow.back().send(plain.substr(
          0, static_cast<std::size_t>(i) % (plain.size() - 1) + 1));
    }
    CHECK(busy(proxy.port(), 20, 20));
    int i = 0;
    for (auto &client : slow) {
      const auto sent = static_cast<std::size_t>(i) % (plain.size() - 1) + 1;
      if (i++ % 2 == 0) {
        client.send(plain.substr(sent));
        CHECK(client.read_response().status == 200);
      }
    }
  }
  CHECK(proxy.alone());
  CHECK(proxy.reaches("cold"));
  CHECK(proxy.comes_back_to(before));
}

TEST_CASE("who says nothing, or not all of it, is let go in the end") {
  if (!in_full) { return; } // it takes more than a minute
  Watched proxy(served());
  RawClient silent(proxy.port()), slow(proxy.port()), kept(proxy.port());
  slow.send("GET / HT");
  CHECK(kept.get("/pid").status == 200);
  const Milliseconds two_minutes(120000);
  const auto response = slow.read_response(false, two_minutes);
  CHECK(response.status == 408);
  CHECK(response.header("Connection") == "close");
  CHECK(silent.at_end(two_minutes));
  CHECK(kept.at_end(two_minutes));
}

TEST_CASE("slow readers hinder nobody and fill no memory") {
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

TEST_CASE("who neither reads nor sends costs no time") {
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

TEST_CASE("a flood of connections") {
  Watched proxy(served("16"));
  const auto before = at_rest(proxy, 10);
  // The watcher is one of the 16.
  std::list<RawClient> inside;
  for (int i = 0; i < 15; ++i) {
    inside.emplace_back(proxy.port());
    CHECK(inside.back().get("/pid").status == 200);
  }
  const int count = in_full ? 2000 : 200;
  SUBCASE("that ask for something are told to come back") {
    for (int i = 0; i < count; ++i) {
      const auto response = get(proxy.port(), "/pid");
      CHECK(response.status == 503);
      CHECK(response.header("Retry-After") != "");
      CHECK(response.header("Connection") == "close");
    }
    std::vector<std::thread> threads;
    std::atomic<int> told{0}, good{0};
    for (int i = 0; i < 50; ++i) { // and all at once
      threads.emplace_back([&] {
        const auto status = get(proxy.port(), "/pid").status;
        ++(status == 503 ? told : good);
      });
    }
    for (auto &thread : threads) {
      thread.join();
    }
    CHECK(told == 50);
    CHECK(good == 0);
  }
  SUBCASE("that say nothing keep no one else from being told so") {
    std::list<RawClient> silent;
    for (int i = 0; i < 24; ++i) {
      silent.emplace_back(proxy.port());
    }
    CHECK(get(proxy.port(), "/pid", "", Milliseconds(60000)).status == 503);
  }
  SUBCASE("that leave again, leave nothing") {
    for (int i = 0; i < count; ++i) {
      RawClient client(proxy.port());
      if (i % 3 == 1) { client.send("GET /p"); }
      if (i % 3 == 2) { client.send(plain); }
      i % 2 ? client.reset() : client.close();
    }
  }
  CHECK(proxy.figures().threads == before.threads);
  for (auto &client : inside) { // nobody was put out
    CHECK(client.get("/pid").status == 200);
  }
  inside.clear();
  CHECK(wait_for([&] { return get(proxy.port(), "/pid").status == 200; }));
  CHECK(proxy.alone());
  CHECK(proxy.reaches("cold"));
  CHECK(proxy.comes_back_to(before));
}

TEST_CASE("clients that vanish at every stage leave nothing") {
  TemporaryDirectory directory;
  const auto request = [](const std::string &line,
                          const std::string &lines = "") {
    return line + " HTTP/1.1\r\nHost: test\r\n" + lines + "\r\n";
  };
  const std::string upgrade = "Connection: Upgrade\r\nUpgrade: echo\r\n";
  const struct {
    const char *name;
    std::string sent;
    const char *seen; // before it goes; "" to go at once
  } stages[] = {
      {"connected", "", ""},
      {"within the head", "GET / HTTP/1.1\r\nHo", ""},
      {"behind the head", request("GET /pid"), ""},
      {"behind several", plain + plain + plain, ""},
      {"while it waits for the answer", request("GET /slow?ms=20"), ""},
      {"before the body", request("POST /upload", "Content-Length: 9\r\n"), ""},
      {"within the body",
       request("POST /upload", "Content-Length: 9000000\r\n") +
           std::string(100000, 'x'),
       ""},
      {"within a chunk",
       request("POST /upload", "Transfer-Encoding: chunked\r\n") + "9\r\nxx",
       ""},
      {"within the answer", request("GET /bytes?n=50000000"), "\r\n\r\n"},
      {"within a chunked answer", request("GET /chunked?n=50000000"),
       "\r\n\r\n"},
      {"within an answer that ends by close", request("GET /close?n=50000000"),
       "\r\n\r\n"},
      {"behind the answer", plain, "\r\n\r\n"},
      {"within a stream", request("GET /sse?n=2&gate=" + (directory / "never")),
       "data: 1"},
      {"within a tunnel", request("GET /ws", upgrade) + "hello", "hello"},
      {"at a tunnel's begin", request("GET /ws", upgrade), ""},
      {"within a refusal", "GET / HTTP/9.9\r\n\r\n", "\r\n\r\n"},
      {"before a refusal", "GET /\r\n\r\n", ""},
      {"asking for the status", request("GET /-/status"), ""},
  };
  Watched proxy(served());
  const auto before = at_rest(proxy);
  const int rounds = in_full ? 100 : 5;
  long rss = 0;
  for (int round = 0; round < rounds; ++round) {
    for (const auto &stage : stages) {
      CAPTURE(stage.name);
      for (const int way : {0, 1, 2}) {
        RawClient client(proxy.port());
        client.send(stage.sent);
        if (*stage.seen) { client.read_until(stage.seen); }
        if (way == 0) { client.close(); }
        if (way == 1) { client.reset(); }
        if (way == 2) {
          client.shutdown_write();
          client.close();
        }
      }
    }
    if (round == 0) {
      CHECK(proxy.alone());
      rss = proxy.figures().rss;
    }
  }
  CHECK(get(proxy.port(), "/pid").status == 200);
  CHECK(proxy.alone());
  CHECK(proxy.reaches("cold"));
  CHECK(proxy.comes_back_to(before));
  const auto after = proxy.figures();
  MESSAGE("resident after one round ", rss, " kB, after ", rounds, " rounds ",
          after.rss, " kB");
  if (!sanitized) { CHECK(after.rss < rss + 2048); }
}

TEST_CASE("clients that vanish during a start leave nothing") {
  auto environment = serve_fake({"--listen-after", "500"});
  environment["WARMPROXY_IDLE_STOP"] = "100ms";
  Watched proxy(environment);
  CHECK(proxy.reaches("cold"));
  const auto before = proxy.figures();
  for (int i = 0; i < 50; ++i) {
    RawClient client(proxy.port());
    client.send(plain);
    i % 2 ? client.reset() : client.close();
  }
  CHECK(get(proxy.port(), "/pid").status == 200);
  CHECK(proxy.alone());
  CHECK(proxy.number("starts") == 1);
  CHECK(proxy.reaches("cold"));
  CHECK(proxy.comes_back_to(before));
}
