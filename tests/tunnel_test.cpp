// Upgrades: after a 101, bytes go both ways until both sides have ended.

#include "figures.hpp"

#include <future>

using namespace support;

namespace {

const std::string websocket =
    "GET /chat?a%20b HTTP/1.1\r\nHost: test\r\nConnection: Upgrade\r\n"
    "Upgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Protocol: a, b\r\n"
    "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n"
    "Origin: http://test\r\n\r\n";
const std::string switching =
    "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: "
    "Upgrade\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n"
    "Sec-WebSocket-Protocol: b\r\n\r\n";

Headers sorted(std::string_view head) {
  auto headers = headers_of(head);
  std::sort(headers.begin(), headers.end());
  return headers;
}

// Echoes everything until the end.
void echo(TargetConnection &c) {
  for (auto text = c.read_some(); !text.empty(); text = c.read_some()) {
    c.send(text);
  }
}
ScriptedTarget::Handler upgrading(std::string response = switching) {
  return [response](TargetConnection &c) {
    if (c.read_head().empty()) { return; }
    c.send(response);
    echo(c);
  };
}

} // namespace

TEST_CASE("tunnel: a WebSocket") {
  Stage stage(upgrading());
  RawClient client(stage.port());
  client.send(websocket);
  const auto response = client.read_response();
  CHECK(response.status == 101);
  CHECK(sorted(response.head) == sorted(switching));
  const auto head = without_forwarded(stage.last().head);
  CHECK(head.find("GET /chat?a%20b HTTP/1.1\r\n") == 0);
  CHECK(sorted(head) == sorted(websocket));
  for (const auto &text :
       {std::string("\x81\x85\0\0\0\0hello", 11), std::string("\0\xFF\r\n", 4),
        std::string("GET / HTTP/1.1\r\nHost: test\r\n\r\n"),
        std::string("0\r\n\r\n"), std::string("\x88\x80\0\0\0\0", 6)}) {
    client.send(text);
    CHECK(client.read_exact(text.size()) == text);
  }
  CHECK(stage.proxy.status().in_flight == 1);
  client.shutdown_write();
  CHECK(client.read_to_end() == "");
  CHECK(wait_for([&] { return stage.proxy.status().in_flight == 0; }));
}

TEST_CASE("tunnel: any protocol can be upgraded to") {
  const struct {
    std::string name, lines, upgrade;
  } cases[] = {
      {"another", "Connection: upgrade\r\nUpgrade: foo/2\r\n", "foo/2"},
      {"one of several", "Connection: Upgrade\r\nUpgrade: a/1, b\r\n",
       "a/1, b"},
      {"Connection with more in it",
       "Connection: keep-alive, UPGRADE, X\r\nX: 1\r\nupgrade: raw\r\n", "raw"},
      {"in several Connection lines",
       "Connection: keep-alive\r\nConnection: Upgrade\r\nUpgrade: raw\r\n",
       "raw"},
  };
  for (const auto &c : cases) {
    CAPTURE(c.name);
    for (const std::string method : {"GET", "POST", "OPTIONS"}) {
      Stage stage(upgrading("HTTP/1.1 101 Go\r\nConnection: Upgrade, Y\r\n"
                            "Upgrade: some/1\r\nY: 1\r\n\r\n"));
      RawClient client(stage.port());
      client.send(method + " / HTTP/1.1\r\nHost: test\r\n" + c.lines + "\r\n");
      const auto response = client.read_response();
      CHECK(sorted(response.head) ==
            Headers{{"Connection", "Upgrade"}, {"Upgrade", "some/1"}});
      const auto headers = headers_of(without_forwarded(stage.last().head));
      CHECK(headers.size() == 3); // and Host
      CHECK(header_of(headers, "Connection") == "Upgrade");
      CHECK(header_of(headers, "Upgrade") == c.upgrade);
      client.send("bytes");
      CHECK(client.read_exact(5) == "bytes");
    }
  }
}

TEST_CASE("tunnel: bytes directly behind the heads") {
  const std::string early(100000, 'e');
  Stage stage([&](TargetConnection &c) {
    if (c.read_head().empty()) { return; }
    c.send(switching + "welcome" + early);
    echo(c);
  });
  RawClient client(stage.port());
  client.send(websocket + "first");
  CHECK(client.read_response().status == 101);
  CHECK((client.read_exact(7 + early.size()) == "welcome" + early));
  CHECK(client.read_exact(5) == "first");
}

TEST_CASE("tunnel: more than a buffer directly behind the head") {
  const std::string early(1 << 20, 'e');
  Stage stage(upgrading());
  RawClient client(stage.port());
  const auto sender =
      std::async(std::launch::async, [&] { client.send(websocket + early); });
  CHECK(client.read_response().status == 101);
  CHECK((client.read_exact(early.size()) == early));
  sender.wait();
}

TEST_CASE("tunnel: a request body comes before the tunnel") {
  Stage stage([](TargetConnection &c) {
    const auto head = c.read_head();
    if (head.empty()) { return; }
    c.send("HTTP/1.1 101 Go\r\nConnection: Upgrade\r\nUpgrade: raw\r\n\r\n" +
           c.read_body(head));
    echo(c);
  });
  RawClient client(stage.port());
  client.send(
      "POST / HTTP/1.1\r\nHost: test\r\nConnection: Upgrade\r\nUpgrade: "
      "raw\r\nContent-Length: 4\r\n\r\nbodymore");
  CHECK(client.read_response().status == 101);
  CHECK(client.read_exact(8) == "bodymore");
}

TEST_CASE("tunnel: a megabyte in both directions at once") {
  const std::uint64_t size = 1 << 20;
  Stage stage([&](TargetConnection &c) {
    if (c.read_head().empty()) { return; }
    c.send(switching);
    const auto sender =
        std::async(std::launch::async, [&] { c.send_generated(size); });
    const auto read = c.verify_generated(size);
    sender.wait();
    if (read != size) { throw Error("not all has come"); }
    c.send("all");
  });
  RawClient client(stage.port());
  client.send(websocket);
  CHECK(client.read_response().status == 101);
  // Both sides read only when everything is sent.
  client.send_generated(size);
  CHECK(client.verify_generated(size) == size);
  CHECK(client.read_exact(3) == "all");
}

TEST_CASE("tunnel: each direction ends on its own") {
  SUBCASE("the client first") {
    Stage stage([](TargetConnection &c) {
      if (c.read_head().empty()) { return; }
      c.send(switching);
      const auto all = c.read_to_end();
      c.send("after the end: " + all);
    });
    RawClient client(stage.port());
    client.send(websocket);
    CHECK(client.read_response().status == 101);
    client.send("last words");
    client.shutdown_write();
    CHECK(client.read_to_end() == "after the end: last words");
    CHECK(!client.was_reset());
  }
  SUBCASE("the client, directly after its head") {
    Stage stage([](TargetConnection &c) {
      if (c.read_head().empty()) { return; }
      c.send(switching);
      c.send("after the end: " + c.read_to_end());
    });
    RawClient client(stage.port());
    client.send(websocket + "last words");
    CHECK(client.read_response().status == 101);
    client.shutdown_write();
    CHECK(client.read_to_end() == "after the end: last words");
  }
  SUBCASE("the target first") {
    Gate ended;
    std::string heard;
    Stage stage([&](TargetConnection &c) {
      if (c.read_head().empty()) { return; }
      c.send(switching + "last words");
      c.shutdown_write();
      heard = c.read_to_end();
      ended.open();
    });
    RawClient client(stage.port());
    client.send(websocket);
    CHECK(client.read_response().status == 101);
    CHECK(client.read_to_end() == "last words");
    client.send("after the end");
    client.shutdown_write();
    ended.wait();
    CHECK(heard == "after the end");
  }
  SUBCASE("a megabyte after the end of the other direction") {
    const std::uint64_t size = 1 << 20;
    Stage stage([&](TargetConnection &c) {
      if (c.read_head().empty()) { return; }
      c.send(switching);
      c.read_to_end();
      c.send_generated(size);
    });
    RawClient client(stage.port());
    client.send(websocket);
    CHECK(client.read_response().status == 101);
    client.shutdown_write();
    CHECK(client.verify_generated(size) == size);
    CHECK(client.at_end());
  }
}

TEST_CASE("tunnel: a reset on one side resets the other") {
  SUBCASE("by the client") {
    Gate gone;
    Stage stage([&](TargetConnection &c) {
      if (c.read_head().empty()) { return; }
      c.send(switching);
      c.read_to_end();
      gone.open();
    });
    RawClient client(stage.port());
    client.send(websocket);
    CHECK(client.read_response().status == 101);
    client.reset();
    gone.wait();
    CHECK(wait_for([&] { return stage.proxy.status().in_flight == 0; }));
  }
  SUBCASE("by the target") {
    Stage stage([&](TargetConnection &c) {
      if (c.read_head().empty()) { return; }
      c.send(switching + "last");
      c.read_exact(4);
      c.reset();
    });
    RawClient client(stage.port());
    client.send(websocket);
    CHECK(client.read_response().status == 101);
    CHECK(client.read_exact(4) == "last");
    client.send("word");
    client.read_to_end();
    CHECK(client.was_reset());
    CHECK(wait_for([&] { return stage.proxy.status().in_flight == 0; }));
  }
}

TEST_CASE("tunnel: ends when the target takes no more, though the client does "
          "not close") {
  Stage stage([](TargetConnection &c) {
    if (c.read_head().empty()) { return; }
    c.send(switching);
  });
  RawClient client(stage.port());
  client.send(websocket);
  CHECK(client.read_response().status == 101);
  CHECK(client.at_end());
  CHECK(wait_for([&] {
    client.send("is anybody there?");
    return stage.proxy.status().in_flight == 0;
  }));
}

// Or it would hold the next stop, and keep the next target from being idle.
TEST_CASE("tunnel: ends with the target, though the client does not close") {
  RunningProxy proxy(fake_target());
  RawClient client(proxy.port());
  client.send("GET /ws HTTP/1.1\r\nHost: test\r\nConnection: Upgrade\r\n"
              "Upgrade: echo\r\n\r\n");
  CHECK(client.read_response().status == 101);
  CHECK(proxy.status().in_flight == 1);
  kill(static_cast<pid_t>(proxy.status().pid), SIGKILL);
  CHECK(client.at_end());
  CHECK(wait_for([&] { return proxy.status().in_flight == 0; }));
}

// Such as the close frame that says why: a message is too long, or a policy was
// violated.
TEST_CASE("tunnel: what is sent directly before a reset arrives") {
  Gate asked, ended;
  bool by_client = false;
  std::string heard;
  ScriptedTarget target([&](TargetConnection &c) {
    if (c.read_head().empty()) { return; }
    c.send(switching);
    if (by_client) {
      heard = c.read_to_end();
    } else {
      asked.wait();
      c.send("last words");
      c.reset();
    }
    ended.open();
  });
  SUBCASE("by the client") { by_client = true; }
  SUBCASE("by the target, while the client sends") {}
  ServeProcess proxy({{"PATH", "/bin:/usr/bin"},
                      {"WARMPROXY_BINARY", "true"},
                      {"WARMPROXY_TARGET_PORT", std::to_string(target.port())},
                      {"WARMPROXY_HEALTH_PATH", ""}});
  RawClient client(proxy.port());
  client.send(websocket);
  CHECK(client.read_response().status == 101);
  if (!by_client) { // more than the socket buffers on the way take
    CHECK_THROWS_AS(client.send(std::string(30 << 20, 'm'), Milliseconds(300)),
                    Error);
  }
  // The proxy stands still, so that it gets both at once.
  proxy.signal(SIGSTOP);
  if (by_client) {
    client.send("last words");
    client.reset();
    proxy.signal(SIGCONT);
    ended.wait();
    CHECK(heard == "last words");
  } else {
    asked.open();
    ended.wait();
    proxy.signal(SIGCONT);
    CHECK(client.read_exact(10) == "last words");
  }
}

// For WARMPROXY_TEST_IDLE seconds; the default is a few times longer than every
// time limit that is set here.
TEST_CASE("tunnel: has no idle timeout") {
  const auto idle = std::chrono::seconds(
      std::atoi(environment_or("WARMPROXY_TEST_IDLE", "1").c_str()));
  auto options = fake_target();
  options.idle_stop = Milliseconds(300);
  options.stop_timeout = Milliseconds(300);
  RunningProxy proxy(options);
  RawClient client(proxy.port());
  client.send("GET /ws HTTP/1.1\r\nHost: test\r\nConnection: Upgrade\r\n"
              "Upgrade: raw\r\n\r\n");
  CHECK(client.read_response().status == 101);
  const auto status = proxy.status();
  CHECK(!client.readable(idle));
  client.send("still here");
  CHECK(client.read_exact(10) == "still here");
  CHECK(proxy.status().pid == status.pid);
  CHECK(proxy.status().starts == 1);
  client.shutdown_write();
  CHECK(client.at_end());
  // Now it is idle.
  CHECK(wait_for([&] { return proxy.status().state == "cold"; }));
}

TEST_CASE(
    "tunnel: a half-closed tunnel costs no CPU time, and a reset ends it") {
  std::promise<void> over;
  const auto waited = over.get_future().share();
  ScriptedTarget target([&](TargetConnection &c) {
    if (c.read_head().empty()) { return; }
    c.send(switching);
    waited.wait(); // it neither reads nor closes
  });
  Watched proxy({{"WARMPROXY_BINARY", "/bin/false"},
                 {"WARMPROXY_TARGET_PORT", std::to_string(target.port())},
                 {"WARMPROXY_HEALTH_PATH", ""}});
  RawClient client(proxy.port());
  client.send(websocket);
  CHECK(client.read_response().status == 101);
  SUBCASE("after a half-close") { client.shutdown_write(); }
  SUBCASE("after more than the target reads") {
    const std::string large(64u << 20, 'x');
    CHECK_THROWS_AS(client.send(large, Milliseconds(300)), Error);
  }
  CHECK(rests(proxy.pid()));
  CHECK(proxy.number("in_flight") == 1);
  client.reset();
  CHECK(proxy.alone());
  over.set_value();
}

TEST_CASE("tunnel: a refused upgrade is an ordinary response") {
  for (const std::string status :
       {"403 No", "404 Where", "200 OK", "503 Busy"}) {
    CAPTURE(status);
    const auto raw_response =
        "HTTP/1.1 " + status +
        "\r\nSec-WebSocket-Version: 13\r\nContent-Length: "
        "4\r\n\r\nbody";
    Stage stage(answering(raw_response));
    RawClient client(stage.port());
    for (int i = 0; i < 2; ++i) {
      // Followed by what would have been the first bytes of the tunnel.
      client.send(websocket + "GET /next HTTP/1.1\r\nHost: test\r\n\r\n");
      for (int part = 0; part < 2; ++part) {
        const auto response = client.read_response();
        CHECK(response.head + response.body == raw_response);
      }
      CHECK(stage.last().head.find("GET /next ") == 0);
    }
  }
}

TEST_CASE(
    "tunnel: a 426 keeps its Upgrade header") { // RFC 9110, section 15.5.22
  Stage stage(answering("HTTP/1.1 426 Upgrade Required\r\nUpgrade: "
                        "TLS/1.0\r\nConnection: Upgrade\r\nContent-Length: "
                        "2\r\n\r\nno"));
  RawClient client(stage.port());
  for (int i = 0; i < 2; ++i) {
    const auto response = client.get();
    CHECK(response.status == 426);
    CHECK(response.header("Upgrade") == "TLS/1.0");
    CHECK(response.header("Connection") == "Upgrade");
    CHECK(response.body == "no");
  }
}

TEST_CASE("tunnel: an unrequested 101 becomes 502") {
  const struct {
    std::string name, request;
  } cases[] = {
      {"no upgrade", "GET / HTTP/1.1\r\nHost: test\r\n\r\n"},
      {"no Connection",
       "GET / HTTP/1.1\r\nHost: test\r\nUpgrade: websocket\r\n\r\n"},
      {"no Upgrade",
       "GET / HTTP/1.1\r\nHost: test\r\nConnection: Upgrade\r\n\r\n"},
      {"in HTTP/1.0", "GET / HTTP/1.0\r\nHost: test\r\nConnection: "
                      "Upgrade\r\nUpgrade: websocket\r\n\r\n"},
  };
  for (const auto &c : cases) {
    CAPTURE(c.name);
    Stage stage(upgrading(switching + "tunnelled"));
    RawClient client(stage.port());
    const auto response = client.exchange(c.request);
    CHECK(response.status == 502);
    const auto headers = headers_of(stage.last().head);
    CHECK(count_of(headers, "Upgrade") == 0);
    CHECK(count_of(headers, "Connection") == 0);
    CHECK(response.body.find("tunnelled") == std::string::npos);
  }
}

TEST_CASE("tunnel: an upgrade after interim responses and other requests") {
  Stage stage([](TargetConnection &c) {
    for (auto head = c.read_head(); !head.empty(); head = c.read_head()) {
      if (header_of(head, "Upgrade").empty()) {
        c.send(ok());
      } else {
        c.send("HTTP/1.1 103 Early Hints\r\n\r\n" + switching);
        echo(c);
        return;
      }
    }
  });
  RawClient client(stage.port());
  CHECK(client.get().body == "ok");
  CHECK(client.post("/", "x").body == "ok");
  client.send(websocket);
  CHECK(client.read_response().status == 103);
  CHECK(client.read_response().status == 101);
  client.send("bytes");
  CHECK(client.read_exact(5) == "bytes");
  CHECK(get(stage.port()).body == "ok"); // on a new connection
}
