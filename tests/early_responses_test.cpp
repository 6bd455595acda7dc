// Responses that arrive before their request is complete.

#include "handlers.hpp"

#include <doctest/doctest.h>

#include <future>

using namespace support;
using namespace std::string_literals;

TEST_CASE("early responses: a 413 reaches a client that still sends 20 MB") {
  // As much as the proxy's kernel takes at once: a target that closes with
  // bytes unread resets, and what it had not sent by then is gone for any
  // client.
  const std::string body(10000, 'l');
  const std::string raw_response =
      "HTTP/1.1 413 Too Large\r\nContent-Length: " +
      std::to_string(body.size()) + "\r\n\r\n" + body;
  const std::size_t large = 20u << 20;
  const struct {
    std::string name;
    Script end;
  } cases[] = {
      {"and reads on", [](TargetConnection &c) { c.read_to_end(); }},
      {"and closes", [](TargetConnection &c) { c.close(); }},
      {"and half-closes",
       [](TargetConnection &c) {
         c.shutdown_write();
         c.read_to_end();
       }},
      {"and never reads",
       [](TargetConnection &c) {
         // Until the peer has closed, so that the response was not lost.
         pollfd p = {c.fd(), POLLRDHUP, 0};
         poll(&p, 1, static_cast<int>(patience.count()));
       }},
  };
  for (const auto &c : cases) {
    CAPTURE(c.name);
    for (const bool chunked : {false, true}) {
      CAPTURE(chunked);
      Stage stage([&](TargetConnection &connection) {
        if (connection.read_head().empty()) { return; }
        connection.send(raw_response);
        c.end(connection);
      });
      RawClient client(stage.port());
      client.send("POST / HTTP/1.1\r\nHost: test\r\n" +
                  (chunked ? "Transfer-Encoding: chunked\r\n\r\n1400000\r\n"s
                           : "Content-Length: 20971520\r\n\r\n"s));
      auto sender = std::async(std::launch::async,
                               [&] { return client.send_generated(large); });
      const auto response = client.read_response();
      CHECK(response.status == 413);
      CHECK((response.body == body));
      CHECK(response.complete);
      CHECK(response.header("Connection") == "close");
      CHECK(sender.get()); // all was taken: else a client might never read it
    }
  }
}

// RFC 9112, section 9.3: a target that keeps the connection reads on.
TEST_CASE("early responses: the rest of the request still reaches the target") {
  const std::size_t large = 5u << 20;
  std::atomic<std::size_t> received{0};
  Stage stage([&](TargetConnection &c) {
    if (c.read_head().empty()) { return; }
    c.send(ok("accepted"));
    received = c.read_exact(large).size();
    c.read_to_end();
  });
  RawClient client(stage.port());
  client.send("POST / HTTP/1.1\r\nHost: test\r\nContent-Length: " +
              std::to_string(large) + "\r\n\r\n");
  CHECK(client.read_response().body == "accepted");
  CHECK(client.send_generated(large));
  CHECK(client.read_to_end() == "");
  CHECK(wait_for([&] { return received == large; }));
}

// They send no more, and wait for the end or for their next turn.
TEST_CASE("early responses: nobody waits for a body that will not come") {
  Gate answered;
  Stage stage([&](TargetConnection &c) {
    if (c.read_head().empty()) { return; }
    c.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
           "5\r\nearly\r\n0\r\n\r\n");
    c.read_to_end();
    answered.open();
  });
  std::string head = "POST / HTTP/1.1\r\nHost: test\r\nContent-Length: 9\r\n";
  SUBCASE("a client that awaits a 100") { head += "Expect: 100-continue\r\n"; }
  SUBCASE("an HTTP/1.0 client, which awaits the end") {
    head = "POST / HTTP/1.0\r\nHost: test\r\nContent-Length: 9\r\n";
  }
  RawClient client(stage.port());
  client.send(head + "\r\n");
  CHECK(client.read_until("early") != "");
  answered.wait(); // the client's side is still open
  client.read_to_end();
  CHECK(!client.was_reset());
}

TEST_CASE("early responses: a malformed chunk after the response is no error") {
  Stage stage([](TargetConnection &c) {
    if (c.read_head().empty()) { return; }
    c.send(ok("early"));
    c.read_to_end();
  });
  RawClient client(stage.port());
  client.send("POST / HTTP/1.1\r\nHost: test\r\n"
              "Transfer-Encoding: chunked\r\n\r\n");
  CHECK(client.read_response().body == "early");
  client.send("what?\r\n" + std::string(300000, 'x'));
  CHECK(client.read_to_end() == "");
  CHECK(!client.was_reset());
}

TEST_CASE("early responses: the connection is closed after the response") {
  Stage stage([](TargetConnection &c) {
    if (c.read_head().empty()) { return; }
    c.read_exact(2);
    c.send(ok("early"));
    c.read_to_end();
  });
  RawClient client(stage.port());
  client.send(post_head + "bo");
  const auto response = client.read_response();
  CHECK(response.head ==
        "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\n");
  CHECK(response.body == "early");
  client.send("dyGET /smuggled HTTP/1.1\r\nHost: test\r\n\r\n");
  CHECK(client.read_to_end() == "");
  CHECK(stage.target.requests().size() == 1);
}
