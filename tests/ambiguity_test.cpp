// What could be read in two ways is refused, or made into what can be read in
// one. A refused request never reaches the target, and never starts it.

#include "support.hpp"

#include <doctest/doctest.h>

using namespace support;
using namespace std::string_literals; // for bytes behind a NUL

namespace {

const std::string smuggled = "GET /smuggled HTTP/1.1\r\nHost: test\r\n\r\n";

struct Malformed {
  std::string name, bytes;
  int status = 400;
};

// A request with this line in it, or these.
std::string with(const std::string &lines) {
  return "POST / HTTP/1.1\r\nHost: test\r\n" + lines + "\r\n\r\n";
}
std::string requesting(const std::string &line) {
  return line + "\r\nHost: test\r\n\r\n";
}

std::vector<Malformed> malformed() {
  std::vector<Malformed> all = {
      // The request line
      {"a bare LF behind it", "GET / HTTP/1.1\nHost: test\r\n\r\n"},
      {"a bare LF before it", "\nGET / HTTP/1.1\r\nHost: test\r\n\r\n"},
      {"a bare CR before it", requesting("\rGET / HTTP/1.1")},
      {"a bare CR behind it", "GET / HTTP/1.1\rHost: test\r\n\r\n"},
      {"two CRs behind it", "GET / HTTP/1.1\r\r\nHost: test\r\n\r\n"},
      {"nothing else", "GET\r\n\r\n"},
      {"HTTP/0.9", "GET /\r\n\r\n"},
      {"HTTP/0.9 with a blank", "GET / \r\n\r\n"},
      {"a space first", requesting(" GET / HTTP/1.1")},
      {"two spaces", requesting("GET  / HTTP/1.1")},
      {"two spaces further on", requesting("GET /  HTTP/1.1")},
      {"a space last", requesting("GET / HTTP/1.1 ")},
      {"tabs", requesting("GET\t/\tHTTP/1.1")},
      {"a tab and a space", requesting("GET \t/ HTTP/1.1")},
      {"a tab last", requesting("GET / HTTP/1.1\t")},
      {"more words", requesting("GET / HTTP/1.1 x")},
      {"no method", requesting(" / HTTP/1.1")},
      {"a method that is none", requesting("GE(T / HTTP/1.1")},
      {"a method of obs-text", requesting("G\xC9T / HTTP/1.1")},
      {"a method with a NUL", requesting("G\0T / HTTP/1.1"s)},
      {"a method with a colon", requesting("GET: / HTTP/1.1")},
      {"CONNECT", requesting("CONNECT test:443 HTTP/1.1"), 501},
      // The version
      {"no version", requesting("GET / HTTP/")},
      {"a lower-case version", requesting("GET / http/1.1")},
      {"a longer version", requesting("GET / HTTP/1.10")},
      {"leading zeros", requesting("GET / HTTP/01.1")},
      {"half a version", requesting("GET / HTTP/1.")},
      {"a comma", requesting("GET / HTTP/1,1")},
      {"another protocol", requesting("GET / HTTPS/1.1")},
      {"yet another protocol", requesting("GET / RTSP/1.0")},
      {"a NUL behind the version", requesting("GET / HTTP/1.1\0"s)},
      {"HTTP/1.2", requesting("GET / HTTP/1.2"), 505},
      {"HTTP/0.9, spelled out", requesting("GET / HTTP/0.9"), 505},
      {"HTTP/2.0", requesting("GET / HTTP/2.0"), 505},
      {"HTTP/2's preface", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505},
      // The target
      {"a space in the target", requesting("GET /a b HTTP/1.1")},
      {"a tab in it", requesting("GET /a\tb HTTP/1.1")},
      {"a fragment", requesting("GET /a#b HTTP/1.1")},
      {"a NUL", requesting("GET /a\0b HTTP/1.1"s)},
      {"a bare CR in it", requesting("GET /a\rb HTTP/1.1")},
      {"a control character", requesting("GET /a\x01 HTTP/1.1")},
      {"an escape", requesting("GET /\x1b[2J HTTP/1.1")},
      {"a DEL", requesting("GET /\x7f HTTP/1.1")},
      {"no slash", requesting("GET a/b HTTP/1.1")},
      {"a query alone", requesting("GET ?a HTTP/1.1")},
      {"an asterisk for GET", requesting("GET * HTTP/1.1")},
      {"an asterisk and more", requesting("OPTIONS */ HTTP/1.1")},
      {"an authority for GET", requesting("GET test:80 HTTP/1.1")},
      {"another scheme", requesting("GET ftp://test/ HTTP/1.1")},
      {"half a scheme", requesting("GET http:/test/ HTTP/1.1")},
      {"a URL without a host", requesting("GET http:///a HTTP/1.1")},
      {"a URL that ends early", requesting("GET http:// HTTP/1.1")},
      {"a URL with a user", requesting("GET http://u:p@test/ HTTP/1.1")},
      {"a URL of two hosts", requesting("GET http://a,b/ HTTP/1.1")},
      {"a URL with a backslash", requesting("GET http://a\\b/ HTTP/1.1")},
      // Header lines
      {"a space before the colon", with("X : 1")},
      {"a tab before the colon", with("X\t: 1")},
      {"no colon", with("X")},
      {"no colon, blanks", with("X 1")},
      {"no name", with(": 1")},
      {"a blank as the name", with(" : 1")},
      {"a space in the name", with("X Y: 1")},
      {"a folded line", with("X: 1\r\n 2")},
      {"a folded line, tab", with("X: 1\r\n\t2")},
      {"a folded line of blanks", with("X: 1\r\n ")},
      {"a folded first line", "GET / HTTP/1.1\r\n Host: test\r\n\r\n"},
      {"a folded Host", "GET / HTTP/1.1\r\nHost:\r\n test\r\n\r\n"},
      {"no token as the name", with("X(Y): 1")},
      {"a slash in the name", with("X/Y: 1")},
      {"a quoted name", with("\"X\": 1")},
      {"obs-text in the name", with("X\xE9: 1")},
      {"a NUL in the name", with("X\0: 1"s)},
      {"a NUL in the value", with("X: a\0b"s)},
      {"a NUL last", with("X: a\0"s)},
      {"a bare CR in the value", with("X: a\rY: b")},
      {"a bare CR last", with("X: a\r")},
      {"a bare CR first", with("\rX: a")},
      {"a bare LF", with("X: a\nY: b")},
      {"a bare LF at the end", "GET / HTTP/1.1\r\nHost: test\n\r\n"},
      {"an empty line of a bare LF", "GET / HTTP/1.1\r\nHost: test\r\n\n"},
      {"only bare LFs", "GET / HTTP/1.1\nHost: test\n\n"},
      {"a control character in the value", with("X: \x01")},
      {"a bell", with("X: \x07")},
      {"a vertical tab", with("X: a\x0b")},
      {"a form feed", with("X: a\x0c")},
      {"an escape in the value", with("X: \x1b")},
      {"a DEL in the value", with("X: \x7f")},
      // Host
      {"no Host", "GET / HTTP/1.1\r\n\r\n"},
      {"no Host, absolute-form", "GET http://test/ HTTP/1.1\r\n\r\n"},
      {"two Hosts", "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"},
      {"two equal ones", "GET / HTTP/1.1\r\nHost: a\r\nhost: a\r\n\r\n"},
      {"two in HTTP/1.0", "GET / HTTP/1.0\r\nHost: a\r\nHost: a\r\n\r\n"},
      {"a list of Hosts", "GET / HTTP/1.1\r\nHost: a, b\r\n\r\n"},
      {"a Host of two words", "GET / HTTP/1.1\r\nHost: a b\r\n\r\n"},
      {"a Host with a path", "GET / HTTP/1.1\r\nHost: a/b\r\n\r\n"},
      {"a Host with a user", "GET / HTTP/1.1\r\nHost: u@a\r\n\r\n"},
      {"a URL as the Host", "GET / HTTP/1.1\r\nHost: http://a\r\n\r\n"},
      {"a space before Host's colon", "GET / HTTP/1.1\r\nHost : a\r\n\r\n"},
      // Framing
      {"two equal lengths", with("Content-Length: 5\r\nContent-Length: 5")},
      {"two lengths", with("Content-Length: 5\r\ncontent-length: 6")},
      {"a length and chunks",
       with("Content-Length: 5\r\nTransfer-Encoding: chunked")},
      {"chunks and a length",
       with("transfer-encoding: chunked\r\nCONTENT-LENGTH: 0")},
      {"chunks and a bad length",
       with("Transfer-Encoding: chunked\r\nContent-Length: x")},
      {"chunks and a length that Connection names",
       with("Connection: Content-Length\r\nContent-Length: "
            "5\r\nTransfer-Encoding: chunked")},
      {"a length and another coding",
       with("Content-Length: 5\r\nTransfer-Encoding: x")},
      {"chunks in two lines",
       with("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked")},
      {"codings in two lines",
       with("Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked")},
      {"chunks and nothing",
       with("Transfer-Encoding: chunked\r\nTransfer-Encoding:")},
      {"a vertical tab before the coding", with("Transfer-Encoding: \x0b"
                                                "chunked")},
      {"a space before its colon", with("Transfer-Encoding : chunked")},
      {"a folded coding", with("Transfer-Encoding:\r\n chunked")},
      {"a space before the length's colon", with("Content-Length : 5")},
      {"a folded length", with("Content-Length:\r\n 5")},
      {"chunks in HTTP/1.0",
       "POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n"},
      {"chunks and a length in HTTP/1.0",
       "POST / HTTP/1.0\r\nContent-Length: 5\r\nTransfer-Encoding: "
       "chunked\r\n\r\n"},
  };
  for (const std::string length : {"",
                                   "+5",
                                   "-5",
                                   "-0",
                                   "0x5",
                                   "5,5",
                                   "5, 6",
                                   "5,",
                                   ",5",
                                   "5 5",
                                   "5x",
                                   "x5",
                                   "5.0",
                                   "5e0",
                                   "5;",
                                   "\"5\"",
                                   "0b1",
                                   "1_0",
                                   "\xD9\xA5",
                                   "18446744073709551616",
                                   "99999999999999999999999999999999"}) {
    all.push_back({"the length " + length, with("Content-Length: " + length)});
  }
  for (const std::string coding :
       {"", "gzip", "identity", "deflate", "xchunked", "chunkedx", "chunk",
        "gzip, chunked", "identity, chunked", "chunked;q=1", "\"chunked\"",
        "'chunked'", "chun ked", "chunked chunked", "chunked\xA0",
        "[chunked]"}) {
    all.push_back({"the transfer coding " + coding,
                   with("Transfer-Encoding: " + coding), 501});
  }
  // RFC 9112, section 6.3: chunked, but not as the last one, must be a 400.
  for (const std::string codings :
       {"chunked, chunked", "chunked, gzip", "chunked, identity",
        "CHUNKED, gzip, Chunked"}) {
    all.push_back({"the transfer codings " + codings,
                   with("Transfer-Encoding: " + codings)});
  }
  return all;
}

std::vector<std::string> bad_chunks() {
  return {"g\r\n"s,
          "\r\n"s,
          ";x\r\n"s,
          "\r\n\r\n"s,
          ";x\r\n\r\n"s,
          "-1\r\n"s,
          "+1\r\na\r\n0\r\n\r\n"s,
          "0x1\r\na\r\n0\r\n\r\n"s,
          "1h\r\na\r\n0\r\n\r\n"s,
          " 1\r\na\r\n0\r\n\r\n"s,
          "1 \r\na\r\n0\r\n\r\n"s,
          "1\t\r\na\r\n0\r\n\r\n"s,
          "1_0\r\n"s,
          "1,1\r\n"s,
          "\xEF\xBC\x91\r\na\r\n0\r\n\r\n"s,
          "1\na\r\n0\r\n\r\n"s,
          "1\ra\r\n0\r\n\r\n"s,
          "1\r\r\na\r\n0\r\n\r\n"s,
          "1;x\na\r\n0\r\n\r\n"s,
          "1;x\ry\r\na\r\n0\r\n\r\n"s,
          "1;x\x01\r\na\r\n0\r\n\r\n"s,
          "1;\0\r\na\r\n0\r\n\r\n"s,
          "1\0\r\na\r\n0\r\n\r\n"s,
          "1;" + std::string(70000, 'x') + "\r\na\r\n0\r\n\r\n",
          std::string(70000, '0') + "1\r\na\r\n0\r\n\r\n",
          "1\r\nab\r\n0\r\n\r\n"s,
          "2\r\na\r\n0\r\n\r\n"s,
          "1\r\na\n0\r\n\r\n"s,
          "1\r\na\r0\r\n\r\n"s,
          "1\r\na0\r\n\r\n"s,
          "1\r\na\r\n\r\n0\r\n\r\n"s,
          "1\r\naxx0\r\n\r\n"s,
          "1\r\na\n\n0\r\n\r\n"s,
          "1\r\na\r\r0\r\n\r\n"s,
          "1\r\nax\n0\r\n\r\n"s,
          "1\r\na\rx0\r\n\r\n"s,
          "8000000000000000\r\n"s,
          "ffffffffffffffff\r\n"s,
          "10000000000000000\r\n"s,
          "10000000000000001\r\na\r\n0\r\n\r\n"s,
          "fffffffffffffffffffffffffffffffff\r\n"s,
          "0\n\r\n"s,
          "0\r\n\n"s,
          "0\r\n\rx"s,
          "0\r\n x: 1\r\n\r\n"s,
          "0\r\nx\r\n\r\n"s,
          "0\r\n: 1\r\n\r\n"s,
          "0\r\nx : 1\r\n\r\n"s,
          "0\r\nx: 1\n\r\n"s,
          "0\r\nx: 1\r\n 2\r\n\r\n"s,
          "0\r\nx: a\rb\r\n\r\n"s,
          "0\r\nx: \0\r\n\r\n"s,
          "0\r\nx: 1\r\n\n"s,
          "0\r\nx: " + std::string(70000, 'x') + "\r\n\r\n"};
}

// For messages, without what would fill the screen.
std::string shown(const std::string &bytes) {
  std::string text;
  for (const char c : bytes.substr(0, 60)) {
    char escaped[8];
    std::snprintf(escaped, sizeof(escaped),
                  c > ' ' && c < 127 ? "%c" : "\\x%02x",
                  static_cast<unsigned char>(c));
    text += escaped;
  }
  return text;
}

void send_bytewise(RawClient &client, const std::string &text) {
  for (const char c : text) {
    if (!client.send({&c, 1})) {
      return;
    } // refused before the end, and rightly
  }
}

// It is one answer of ours, and the end.
void check_refused(RawClient &client, int status) {
  const auto response = client.read_response();
  CHECK(response.status == status);
  CHECK(response.complete);
  CHECK(response.header("Connection") == "close");
  CHECK(response.header("Content-Type").find("text/plain") == 0);
  CHECK(response.body.find("warmproxy: ") == 0);
  CHECK(response.body.find('\n') == response.body.size() - 1);
  CHECK(client.read_to_end() == "");
}

} // namespace

TEST_CASE("a malformed request does not start the target") {
  RunningProxy proxy(fake_target());
  for (const auto &c : malformed()) {
    CAPTURE(c.name);
    RawClient client(proxy.port());
    client.send(c.bytes + smuggled);
    check_refused(client, c.status);
  }
  for (const auto &chunk : bad_chunks()) {
    if (chunk.size() > 1000) { continue; } // not seen before it would start
    CAPTURE(shown(chunk));
    RawClient client(proxy.port());
    client.send(with("Transfer-Encoding: chunked") + chunk + smuggled);
    check_refused(client, 400);
  }
  CHECK(proxy.status().starts == 0);
  CHECK(proxy.status().requests == 0);
  CHECK(proxy.status().state == "cold");
}

TEST_CASE("a malformed request does not reach the target") {
  Stage stage(answering(ok()));
  for (const auto &c : malformed()) {
    CAPTURE(c.name);
    const auto before = stage.target.received().size();
    {
      RawClient client(stage.port());
      send_bytewise(client, c.bytes + smuggled);
      check_refused(client, c.status);
    }
    CHECK(stage.target.received().size() == before);
    { // nor behind a good one
      RawClient client(stage.port());
      client.send("GET /good HTTP/1.1\r\nHost: test\r\n\r\n" + c.bytes +
                  smuggled);
      CHECK(client.read_response().body == "ok");
      check_refused(client, c.status);
    }
    CHECK(stage.last().head.find("GET /good ") == 0);
  }
  CHECK(stage.target.received().find("smuggled") == std::string::npos);
}

TEST_CASE("a head beyond 64 KB is refused") {
  Stage stage(answering(ok()));
  const std::string start = "GET / HTTP/1.1\r\nHost: test\r\n";
  const auto padded = [&](std::size_t size) {
    const auto length = size - start.size() - std::strlen("X: \r\n\r\n");
    return start + "X: " + std::string(length, 'x') + "\r\n\r\n";
  };
  CHECK(exchange(stage.port(), padded(64 * 1024)).status == 200);
  const auto before = stage.target.received().size();
  for (const auto &head :
       {padded(64 * 1024 + 1), padded(200000),
        "GET /" + std::string(70000, 'x') + " HTTP/1.1\r\nHost: test\r\n\r\n",
        std::string(70000, 'x')}) {
    RawClient client(stage.port());
    client.send(head);
    check_refused(client, 431);
  }
  CHECK(stage.target.received().size() == before);
}

TEST_CASE("a head that would cost us more than its size is refused") {
  Stage stage(answering(ok()));
  const std::string start = "GET / HTTP/1.1\r\nHost: test\r\n";
  const auto times = [](int n, const std::string &text) {
    std::string all;
    while (n-- > 0) {
      all += text;
    }
    return all;
  };
  for (const auto &[sent, status] :
       {std::pair<std::string, int>{start + times(999, "X: 1\r\n"), 200},
        {start + times(1000, "X: 1\r\n"), 431},
        {start + times(20000, "X:\r\n"), 431},
        {start + "Connection: " + times(99, "x,") + "x\r\n", 200},
        {start + "Connection: " + times(100, "x,") + "x\r\n", 431}}) {
    const auto before = stage.target.received().size();
    RawClient client(stage.port());
    client.send(sent + "\r\n");
    if (status == 200) {
      CHECK(client.read_response().status == 200);
    } else {
      check_refused(client, 431);
      CHECK(stage.target.received().size() == before);
    }
  }
}

// Blanks and case differ, and so would what strict and lenient targets see.
TEST_CASE("framing is told to the target in one way") {
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

// Its head may have been handed on before; of what follows, the target gets no
// more than a part.
TEST_CASE("a malformed chunk ends its request") {
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

TEST_CASE("a malformed chunk, when the answer has begun, cuts it") {
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

// ---- answers ---------------------------------------------------------------

TEST_CASE("a malformed answer is a 502") {
  const std::string k70(70000, 'x');
  std::vector<std::pair<std::string, std::string>> cases = {
      {"no HTTP", "Hello\r\n\r\n"},
      {"an empty line first", "\r\nHTTP/1.1 200 OK\r\n\r\n"},
      {"no status", "HTTP/1.1 OK\r\n\r\n"},
      {"a status of two digits", "HTTP/1.1 20 OK\r\n\r\n"},
      {"a status of four", "HTTP/1.1 2000 OK\r\n\r\n"},
      {"a status of letters", "HTTP/1.1 2x0 OK\r\n\r\n"},
      {"a status below 100", "HTTP/1.1 099 OK\r\n\r\n"},
      {"a signed status", "HTTP/1.1 +20 OK\r\n\r\n"},
      {"two spaces", "HTTP/1.1  200 OK\r\n\r\n"},
      {"HTTP/2", "HTTP/2 200 OK\r\n\r\n"},
      {"HTTP/2.0", "HTTP/2.0 200 OK\r\n\r\n"},
      {"lower case", "http/1.1 200 OK\r\n\r\n"},
      {"another protocol", "ICY 200 OK\r\n\r\n"},
      {"a NUL in the reason", "HTTP/1.1 200 O\0K\r\n\r\n"s},
      {"a bare CR in the reason", "HTTP/1.1 200 O\rK\r\n\r\n"},
      {"a folded status line", "HTTP/1.1 200 OK\r\n X: 1\r\n\r\n"},
      {"a 101 nobody asked for",
       "HTTP/1.1 101 Go\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n"},
      {"a head beyond 64 KB", "HTTP/1.1 200 OK\r\nX: " + k70 + "\r\n\r\n"},
      {"a head without end", "HTTP/1.1 200 " + k70},
      {"a malformed one behind an interim one",
       "HTTP/1.1 200OK\r\nContent-Length: 0\r\n\r\n"},
  };
  for (const auto &lines :
       {"X : 1"s,
        "X"s,
        ": 1"s,
        "X: 1\r\n 2"s,
        "X: a\0b"s,
        "X: a\rb"s,
        "X\xE9: 1"s,
        "X Y: 1"s,
        "Content-Length: 5\r\nContent-Length: 6"s,
        "Content-Length: 5, 6"s,
        "Content-Length: x"s,
        "Content-Length: -1"s,
        "Content-Length:"s,
        "Content-Length: 18446744073709551616"s,
        "Transfer-Encoding: gzip"s,
        "Transfer-Encoding: gzip, chunked"s,
        "Transfer-Encoding: chunked, chunked"s,
        "Transfer-Encoding:"s,
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked"s,
        "Transfer-Encoding: chunked\r\nContent-Length: x"s}) {
    cases.emplace_back(shown(lines),
                       "HTTP/1.1 200 OK\r\n" + lines + "\r\n\r\nbody");
  }
  cases.emplace_back("chunks in HTTP/1.0",
                     "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
                     "0\r\n\r\n");
  Stage stage(dictated());
  for (const auto &c : cases) {
    CAPTURE(c.first);
    const auto response = exchange(stage.port(), dictate(c.second));
    CHECK(response.status == 502);
    CHECK(response.complete);
    CHECK(response.body.find("warmproxy: ") == 0);
  }
  CHECK(exchange(stage.port(), dictate(ok("good"))).body == "good");
}

TEST_CASE("a malformed answer does not cost the client its connection") {
  std::atomic<int> n{0};
  Stage stage(answering_with([&](const std::string &, const std::string &) {
    return n++ % 2 ? ok("good") : "HTTP/1.1 200 OK\r\nX : 1\r\n\r\n";
  }));
  RawClient client(stage.port());
  for (int i = 0; i < 3; ++i) {
    CHECK(client.get().status == 502);
    CHECK(client.get().body == "good");
  }
}

// There is no body to mistake, but a cache would keep the wrong length.
TEST_CASE("malformed framing is refused even where there is no body") {
  Stage stage(dictated());
  for (const std::string lines :
       {"Content-Length: x", "Content-Length: 5\r\nContent-Length: 6",
        "Content-Length:", "Transfer-Encoding: gzip"}) {
    CAPTURE(lines);
    for (const std::string method : {"HEAD", "GET"}) {
      const auto answer = "HTTP/1.1 " +
                          std::string(method == "GET" ? "304 Same" : "200 OK") +
                          "\r\n" + lines + "\r\n\r\n";
      CHECK(exchange(stage.port(), dictate(answer, method)).status == 502);
    }
  }
}

TEST_CASE("an answer is told to the client in one way") {
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

// Cut, so that it can be neither taken for whole nor read on beyond.
TEST_CASE("a malformed chunk in an answer cuts it") {
  const std::string poison =
      "HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison";
  for (const auto &chunk : bad_chunks()) {
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
      client.send("GET / HTTP/1.1\r\nHost: test\r\n\r\n");
      std::string text;
      if (!at_once) {
        text = client.read_until("good\r\n");
        seen.open();
      }
      text += client.read_to_end();
      CHECK(text.find("poison") == std::string::npos);
      if (text.find("HTTP/1.1 502 ") != 0) {
        CHECK(text.find("0\r\n\r\n") == std::string::npos);
      }
    }
  }
}
