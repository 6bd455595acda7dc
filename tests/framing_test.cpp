// Framing: each side gets one unambiguous form.

#include "malformed.hpp"

using namespace support;

// Blanks and case vary, and strict and lenient targets would disagree.
TEST_CASE("framing: the target gets one form") {
  const struct {
    std::string sent, arrives, body;
  } cases[] = {
      {"Content-Length: 4", "Content-Length: 4", "body"},
      {"Content-Length:4", "Content-Length: 4", "body"},
      {"content-length: \t4 \t", "Content-Length: 4", "body"},
      {"Content-Length: 0004", "Content-Length: 4", "body"},
      {"Content-Length: 00", "Content-Length: 0", ""},
      {"Transfer-Encoding: chunked", "Transfer-Encoding: chunked",
       "4\r\nbody\r\n0\r\n\r\n"},
      {"TRANSFER-ENCODING:Chunked", "Transfer-Encoding: chunked",
       "4\r\nbody\r\n0\r\n\r\n"},
      {"Transfer-Encoding:\tCHUNKED \t", "Transfer-Encoding: chunked",
       "4\r\nbody\r\n0\r\n\r\n"},
  };
  Stage stage(answering(ok()));
  for (const auto &c : cases) {
    CAPTURE(c.sent);
    CHECK(exchange(stage.port(), with(c.sent) + c.body).status == 200);
    const auto &request = stage.last();
    CHECK(request.body == c.body);
    const auto begin = request.head.find("Host: test\r\n") + 12;
    const auto line =
        request.head.substr(begin, request.head.find("\r\n", begin) - begin);
    CHECK(same_name(line, c.arrives));
    CHECK(line.substr(line.find(':')) == c.arrives.substr(c.arrives.find(':')));
  }
}

TEST_CASE("framing: the client gets one form") {
  const std::string start = "HTTP/1.1 200 OK\r\n";
  const struct {
    std::string name, sent, arrives;
  } cases[] = {
      {"bare LFs", "HTTP/1.1 200 OK\nA: 1\nContent-Length: 2\n\nok",
       start + "A: 1\r\nContent-Length: 2\r\n\r\nok"},
      {"one bare LF", start + "A: 1\nContent-Length: 2\r\n\r\nok",
       start + "A: 1\r\nContent-Length: 2\r\n\r\nok"},
      {"equal lengths",
       start + "Content-Length: 2\r\nA: 1\r\ncontent-length: 2\r\n\r\nok",
       start + "Content-Length: 2\r\nA: 1\r\n\r\nok"},
      {"a length and chunks",
       start + "Content-Length: 9\r\nA: 1\r\nTransfer-Encoding: "
               "chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
       start +
           "A: 1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"},
      {"chunks and a length",
       start + "Transfer-Encoding: chunked\r\nContent-Length: "
               "0\r\n\r\n2\r\nok\r\n0\r\n\r\n",
       start + "Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"},
      {"zeros and blanks", start + "Content-Length:\t002 \r\n\r\nok",
       start + "Content-Length: 2\r\n\r\nok"},
      {"Chunked", start + "Transfer-Encoding:CHUNKED\t\r\n\r\n0\r\n\r\n",
       start + "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"},
  };
  Stage stage(dictated());
  RawClient client(stage.port());
  for (const auto &c : cases) {
    CAPTURE(c.name);
    const auto response = client.exchange(dictate(c.sent));
    CHECK(response.head + response.raw_body == c.arrives);
    CHECK(response.complete);
  }
  CHECK(client.exchange(dictate(ok("good"))).body == "good");
}

// The head may have been forwarded by then; the target never gets a complete
// body.
TEST_CASE("framing: a malformed chunk ends its request with 400") {
  const auto head = with("Transfer-Encoding: chunked");
  const std::string good = "4\r\ngood\r\n";
  for (const auto &chunk : bad_chunks()) {
    CAPTURE(shown(chunk));
    for (const std::string way : {"in one piece", "behind its head",
                                  "byte by byte", "behind a good one"}) {
      CAPTURE(way);
      Stage stage([](TargetConnection &c) {
        c.read_head();
        c.read_to_end();
      });
      RawClient client(stage.port());
      if (way == "in one piece") {
        client.send(head + chunk + smuggled);
      } else {
        client.send(head);
        stage.target.request();
        if (way == "behind a good one") {
          client.send(good);
          CHECK(wait_for([&] {
            return stage.target.received().find("good") != std::string::npos;
          }));
        }
        if (way == "byte by byte" && chunk.size() < 1000) {
          send_bytewise(client, chunk + smuggled);
        } else {
          client.send(chunk + smuggled);
        }
      }
      check_refused(client, 400);
      CHECK(wait_for([&] { return stage.proxy.status().in_flight == 0; }));
      const auto received = stage.target.received();
      CHECK(received.find("0\r\n\r\n") == std::string::npos);
      CHECK(received.find("smuggled") == std::string::npos);
    }
  }
}

TEST_CASE("framing: a malformed chunk aborts a response that has begun") {
  Stage stage([](TargetConnection &c) {
    c.read_head();
    c.send(
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\npart\r\n");
    c.read_to_end();
  });
  for (const auto &chunk : bad_chunks()) {
    CAPTURE(shown(chunk));
    RawClient client(stage.port());
    client.send(with("Transfer-Encoding: chunked"));
    client.read_until("part\r\n");
    client.send(chunk + smuggled);
    CHECK(client.read_to_end() == "");
  }
  CHECK(stage.target.received().find("smuggled") == std::string::npos);
}

// So that it can neither be taken as complete nor be read beyond.
TEST_CASE("framing: a malformed chunk of the target aborts the response, or "
          "makes it a 502") {
  const std::string poison =
      "HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison";
  for (const auto &chunk : bad_chunks()) {
    // What a target may send all the same, as it is repaired.
    if (has_blanks_around_size(chunk) || chunk.find("x : 1") != chunk.npos) {
      continue;
    }
    CAPTURE(shown(chunk));
    for (const bool at_once : {true, false}) {
      CAPTURE(at_once);
      Gate seen;
      Stage stage([&](TargetConnection &c) {
        if (c.read_head().empty()) { return; }
        const std::string head =
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
        if (at_once) {
          c.send(head + chunk + poison);
        } else {
          c.send(head + "4\r\ngood\r\n");
          seen.wait();
          c.send(chunk + poison);
        }
        c.read_to_end();
      });
      RawClient client(stage.port());
      client.send("GET / HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n");
      std::string text;
      if (!at_once) {
        text = client.read_until("good\r\n");
        seen.open();
      }
      text += client.read_to_end();
      CHECK(text.find("poison") == std::string::npos);
      const bool is_reply = text.find("HTTP/1.1 502 ") == 0;
      if (chunk.size() < 1000) { CHECK(is_reply == at_once); } // read at once
      if (!is_reply) { CHECK(text.find("0\r\n\r\n") == std::string::npos); }
    }
  }
}

// A reset is for responses to HTTP/1.0 clients that are cut short.
TEST_CASE("framing: a 502 for a malformed chunk does not end with a reset") {
  Stage stage(
      answering(
          "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nwhat?\r\n"),
      [](warmproxy::Options &options) {
        options.keep_alive_timeout = Milliseconds(300);
      });
  RawClient client(stage.port());
  const auto response =
      client.exchange("GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n");
  CHECK(response.status == 502);
  CHECK(response.header("Connection") == "keep-alive");
  CHECK(client.at_end());
  CHECK(!client.was_reset());
}
