// Streaming: each side sends the next piece only when the other side has seen
// the one before, so a piece that is held back stops the test. No clock is
// used.

#include "support.hpp"

#include <doctest/doctest.h>

#include <future>

using namespace support;

namespace {

const std::string request = "GET /events HTTP/1.1\r\nHost: test\r\n\r\n";
const std::string event_stream =
    "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n";

// Counts the pieces that the client has seen.
class Seen {
public:
  void one() { ++count_; }
  void wait_until(int n) {
    if (!wait_for([&] { return count_ >= n; })) {
      throw Error("piece " + std::to_string(n) + " was not seen");
    }
  }

private:
  std::atomic<int> count_{0};
};

} // namespace

TEST_CASE("streaming: each piece of a response arrives at once") {
  const struct {
    std::string name;
    std::string client;              // the request
    std::string head;                // of the response
    std::vector<std::string> pieces; // of the rest, as they are sent
    std::vector<std::string> arrive; // and as they arrive
  } cases[] = {
      {"events until the end",
       request,
       event_stream + "\r\n",
       {"data: 1\n\n", "data: 2\n\n", "data: 3\n\n"},
       {"data: 1\n\n", "data: 2\n\n", "data: 3\n\n"}},
      {"events in chunks",
       request,
       event_stream + "Transfer-Encoding: chunked\r\n\r\n",
       {"9\r\ndata: 1\n\n\r\n", "9\r\ndata: 2\n\n\r\n", "0\r\n\r\n"},
       {"9\r\ndata: 1\n\n\r\n", "9\r\ndata: 2\n\n\r\n", "0\r\n\r\n"}},
      {"events of a length",
       request,
       event_stream + "Content-Length: 18\r\n\r\n",
       {"data: 1\n\n", "data: 2\n\n"},
       {"data: 1\n\n", "data: 2\n\n"}},
      {"single bytes",
       request,
       event_stream + "\r\n",
       {"a", "b", "\r", "\n", "\r", "\n"},
       {"a", "b", "\r", "\n", "\r", "\n"}},
      {"parts of chunks",
       request,
       event_stream + "Transfer-Encoding: chunked\r\n\r\n",
       {"4;x\r\nab", "cd", "\r\n4", "\r\nefgh\r\n", "0\r\nT: 1\r\n", "\r\n"},
       {"4;x\r\nab", "cd", "\r\n4", "\r\nefgh\r\n", "0\r\nT: 1\r\n", "\r\n"}},
      {"chunks for HTTP/1.0",
       "GET /events HTTP/1.0\r\n\r\n",
       event_stream + "Transfer-Encoding: chunked\r\n\r\n",
       {"9\r\ndata: 1\n\n\r\n", "9\r\ndata", ": 2\n\n\r\n", "0\r\n\r\n"},
       {"data: 1\n\n", "data", ": 2\n\n", ""}},
      {"an interim response",
       request,
       "HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n",
       {"HTTP/1.1 103 Early Hints\r\nLink: </y>\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n", "o", "k"},
       {"HTTP/1.1 103 Early Hints\r\nLink: </y>\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n", "o", "k"}},
  };
  for (const auto &c : cases) {
    CAPTURE(c.name);
    Seen seen;
    Stage stage([&](TargetConnection &target) {
      if (target.read_head().empty()) { return; }
      target.send(c.head);
      int n = 0;
      for (const auto &piece : c.pieces) {
        seen.wait_until(++n);
        target.send(piece);
      }
    });
    RawClient client(stage.port());
    client.send(c.client);
    const auto head = client.read_response_head();
    CHECK((head.status == 200 || head.status == 103));
    for (const auto &piece : c.arrive) {
      seen.one(); // the head, or the piece before
      CHECK(client.read_exact(piece.size()) == piece);
    }
    CHECK(stage.target.errors().empty());
  }
}

TEST_CASE("streaming: each piece of a request body arrives at once") {
  const struct {
    std::string name;
    std::string head;
    std::vector<std::string> pieces;
  } cases[] = {
      {"of a length", "Content-Length: 6\r\n\r\n", {"a", "b", "cd", "ef"}},
      {"in chunks",
       "Transfer-Encoding: chunked\r\n\r\n",
       {"1\r\na\r\n", "1\r\nb\r\n", "0\r\n\r\n"}},
      {"parts of chunks",
       "Transfer-Encoding: chunked\r\n\r\n",
       {"4", ";x\r", "\nab", "c", "d\r\n", "0\r\nT", ": 1\r\n", "\r\n"}},
  };
  for (const auto &c : cases) {
    CAPTURE(c.name);
    Stage stage([&](TargetConnection &target) {
      if (target.read_head().empty()) { return; }
      for (const auto &piece : c.pieces) {
        target.read_exact(piece.size());
      }
      target.send(ok());
    });
    RawClient client(stage.port());
    const auto head = "POST / HTTP/1.1\r\nHost: test\r\n" + c.head;
    client.send(head);
    CHECK(without_forwarded(stage.target.request().head) == head);
    auto length = stage.target.received().size();
    for (const auto &piece : c.pieces) {
      client.send(piece);
      length += piece.size();
      CHECK(wait_for([&] { return stage.target.received().size() == length; }));
      CHECK(stage.target.received().substr(length - piece.size()) == piece);
    }
    CHECK(client.read_response().body == "ok");
  }
}

TEST_CASE("streaming: both directions alternate within one exchange") {
  // As gRPC-Web's or a git server's streams: the response comes while the
  // request goes on, each waiting for the other.
  const int rounds = 100;
  Stage stage([&](TargetConnection &target) {
    if (target.read_head().empty()) { return; }
    target.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n");
    for (int i = 0; i < rounds; ++i) {
      target.send(target.read_exact(8));
    }
    target.send(target.read_until("0\r\n\r\n"));
    target.read_to_end();
  });
  RawClient client(stage.port());
  client.send("POST / HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: "
              "chunked\r\n\r\n");
  const auto head = client.read_response_head();
  CHECK(head.status == 200);
  // It began before the request was complete.
  CHECK(head.header("Connection") == "close");
  for (int i = 0; i < rounds; ++i) {
    const auto chunk = "3\r\n" + std::to_string(100 + i) + "\r\n";
    client.send(chunk);
    CHECK(client.read_exact(8) == chunk);
  }
  client.send("0\r\n\r\n");
  CHECK(client.read_to_end() == "0\r\n\r\n");
  CHECK(stage.target.errors().empty());
}

// Neither direction may wait for the other one to make room. The last byte of
// the response is held back, or the rest of the request would not be forwarded.
TEST_CASE("streaming: a large request and a large response at once") {
  const std::uint64_t size = 16u << 20;
  Stage stage([&](TargetConnection &target) {
    if (target.read_head().empty()) { return; }
    target.send("HTTP/1.1 200 OK\r\nContent-Length: " +
                std::to_string(size + 1) + "\r\n\r\n");
    const auto raw_response =
        std::async(std::launch::async, [&] { target.send_generated(size); });
    const auto read = target.verify_generated(size);
    raw_response.wait();
    target.send(read == size ? "!" : "?");
  });
  RawClient client(stage.port());
  const auto sender = std::async(std::launch::async, [&] {
    client.send("POST / HTTP/1.1\r\nHost: test\r\nContent-Length: " +
                std::to_string(size) + "\r\n\r\n");
    client.send_generated(size);
  });
  CHECK(client.read_response_head().status == 200);
  CHECK(client.verify_generated(size) == size);
  CHECK(client.read_to_end() == "!");
  sender.wait();
  CHECK(stage.target.errors().empty());
}

TEST_CASE("streaming: a target that responds only after the whole request") {
  // The response echoes the whole body, which no buffer between could hold.
  const std::size_t size = 32u << 20;
  Stage stage(answering_with(
      [](const std::string &, const std::string &body) { return ok(body); }));
  RawClient client(stage.port());
  client.send("POST / HTTP/1.1\r\nHost: test\r\nContent-Length: " +
              std::to_string(size) + "\r\n\r\n");
  client.send_generated(size);
  CHECK(client.read_response_head().status == 200);
  CHECK(client.verify_generated(size) == size);
}

TEST_CASE("streaming: a slow stream does not delay others") {
  Gate gate;
  Stage stage([&](TargetConnection &target) {
    for (auto head = target.read_head(); !head.empty();
         head = target.read_head()) {
      if (head.find("/slow") != std::string::npos) {
        target.send(event_stream + "\r\nfirst");
        gate.wait();
        target.send("second");
        return;
      }
      target.send(ok());
    }
  });
  RawClient slow(stage.port());
  slow.send("GET /slow HTTP/1.1\r\nHost: test\r\n\r\n");
  slow.read_until("first");
  for (int i = 0; i < 10; ++i) {
    CHECK(get(stage.port()).body == "ok");
  }
  gate.open();
  CHECK(slow.read_to_end() == "second");
}
