// Clients that disconnect: the target learns it, and nothing stays behind.

#include "handlers.hpp"
#include "load.hpp"

using namespace support;

TEST_CASE("client disconnect: the target learns of it at once") {
  const std::string chunked =
      "POST / HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n";
  const struct {
    std::string when;
    std::string request, raw_response;
  } moments[] = {
      {"before the response", plain, ""},
      {"after its body", post_head + "body", ""},
      {"before its body", post_head, ""},
      {"within its body", post_head + "bo", ""},
      {"within a chunk", chunked + "4\r\nbo", ""},
      {"between chunks", chunked + "4\r\nbody\r\n", ""},
      {"behind a pipelined one", plain + plain, ""},
      {"within the response", plain,
       "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\npart"},
      {"within a chunked response", plain,
       "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\npart\r\n"},
      {"within a close-delimited response", plain,
       "HTTP/1.1 200 OK\r\n\r\npart"},
      {"within both", post_head + "bo",
       "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\npart"},
  };
  const struct {
    std::string name;
    void (*leave)(RawClient &);
  } ways[] = {
      {"closes", [](RawClient &c) { c.close(); }},
      {"resets", [](RawClient &c) { c.reset(); }},
      {"half-closes", [](RawClient &c) { c.shutdown_write(); }},
  };
  for (const auto &moment : moments) {
    CAPTURE(moment.when);
    for (const auto &way : ways) {
      CAPTURE(way.name);
      Gate gone;
      Stage stage([&](TargetConnection &c) {
        if (c.read_head().empty()) { return; }
        c.send(moment.raw_response);
        c.read_to_end();
        gone.open();
      });
      RawClient client(stage.port());
      client.send(moment.request);
      stage.target.request();
      if (!moment.raw_response.empty()) { client.read_until("part"); }
      CHECK(stage.proxy.status().in_flight == 1);
      way.leave(client);
      gone.wait();
      CHECK(wait_for([&] { return stage.proxy.status().in_flight == 0; }));
    }
  }
}

TEST_CASE("client disconnect: a target that is sending learns of it") {
  Gate gone;
  Stage stage([&](TargetConnection &c) {
    if (c.read_head().empty()) { return; }
    c.send("HTTP/1.1 200 OK\r\n\r\n");
    while (c.send(std::string(65536, 'x'))) {}
    gone.open();
  });
  RawClient client(stage.port());
  client.send(plain);
  SUBCASE("of a close") {}
  SUBCASE("of a close after a half-close") { client.shutdown_write(); }
  client.read_exact(1 << 20);
  client.close();
  gone.wait();
  CHECK(wait_for([&] { return stage.proxy.status().in_flight == 0; }));
}

// A sanitized target is so slow that the client counts as gone.
TEST_CASE("client disconnect: a half-close does not truncate a response" *
          doctest::skip(sanitized)) {
  const std::uint64_t size = 64 << 20; // more than all socket buffers hold
  Stage stage([&](TargetConnection &c) {
    if (c.read_head().empty()) { return; }
    c.send("HTTP/1.1 200 OK\r\nContent-Length: " + std::to_string(size) +
           "\r\n\r\n");
    c.send_generated(size);
  });
  RawClient client(stage.port());
  client.send(plain);
  client.shutdown_write();
  CHECK(client.read_response_head().status == 200);
  SUBCASE("for a client that reads at once") {}
  SUBCASE("for one that is slow") { // longer than WARMPROXY_HALF_CLOSE_GRACE
    wait_for([] { return false; }, Milliseconds(500));
  }
  CHECK(client.verify_generated(size) == size);
  client.close();
  CHECK(wait_for([&] { return stage.proxy.status().in_flight == 0; }));
}

// It may have closed both directions: only a write would tell, and there is
// nothing to be written.
TEST_CASE("client disconnect: a half-closed client does not wait for ever") {
  Gate gone;
  Stage stage([&](TargetConnection &c) {
    if (c.read_head().empty()) { return; }
    c.read_exact(4); // comes with the end
    c.send("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\npart");
    c.read_to_end();
    gone.open();
  });
  RawClient client(stage.port());
  client.send(post_head);
  stage.target.request();
  client.send("body");
  client.shutdown_write();
  client.read_until("part");
  gone.wait();
  CHECK(wait_for([&] { return stage.proxy.status().in_flight == 0; }));
}

TEST_CASE(
    "client disconnect: an incomplete request body spoils no connection") {
  Stage stage([](TargetConnection &c) {
    for (auto head = c.read_head(); !head.empty(); head = c.read_head()) {
      c.read_body(head);
      c.send(ok());
    }
  });
  {
    RawClient client(stage.port());
    client.send(post_head + "bo");
    stage.target.request();
  }
  CHECK(wait_for([&] { return stage.proxy.status().in_flight == 0; }));
  CHECK(get(stage.port()).status == 200);
  const auto requests = stage.target.requests();
  CHECK(requests.size() == 2);
  CHECK(requests[0].connection != requests[1].connection);
}

TEST_CASE("client disconnect: nothing leaks at any stage") {
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
      {"behind several", get_pid + get_pid + get_pid, ""},
      {"while it waits for the response", request("GET /slow?ms=20"), ""},
      {"before the body", request("POST /upload", "Content-Length: 9\r\n"), ""},
      {"within the body",
       request("POST /upload", "Content-Length: 9000000\r\n") +
           std::string(100000, 'x'),
       ""},
      {"within a chunk",
       request("POST /upload", "Transfer-Encoding: chunked\r\n") + "9\r\nxx",
       ""},
      {"within the response", request("GET /bytes?n=50000000"), "\r\n\r\n"},
      {"within a chunked response", request("GET /chunked?n=50000000"),
       "\r\n\r\n"},
      {"within a close-delimited response", request("GET /close?n=50000000"),
       "\r\n\r\n"},
      {"after the response", get_pid, "\r\n\r\n"},
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

TEST_CASE("client disconnect: nothing leaks during a start") {
  auto environment = serve_fake({"--listen-after", "500"});
  environment["WARMPROXY_IDLE_STOP"] = "100ms";
  Watched proxy(environment);
  CHECK(proxy.reaches("cold"));
  const auto before = proxy.figures();
  for (int i = 0; i < 50; ++i) {
    RawClient client(proxy.port());
    client.send(get_pid);
    i % 2 ? client.reset() : client.close();
  }
  CHECK(get(proxy.port(), "/pid").status == 200);
  CHECK(proxy.alone());
  CHECK(proxy.number("starts") == 1);
  CHECK(proxy.reaches("cold"));
  CHECK(proxy.comes_back_to(before));
}
