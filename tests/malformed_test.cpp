// Heads that could be read in more than one way are refused.

#include "malformed.hpp"

using namespace support;

namespace {

struct Malformed {
  std::string name, bytes;
  int status = 400;
};
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
      {"no token as the scheme", requesting("GET 1http://test/ HTTP/1.1")},
      {"an empty scheme", requesting("GET ://test/ HTTP/1.1")},
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

} // namespace

TEST_CASE("request head: a malformed one does not start the target") {
  RunningProxy proxy(fake_target());
  for (const auto &c : malformed()) {
    CAPTURE(c.name);
    RawClient client(proxy.port());
    client.send(c.bytes + smuggled);
    check_refused(client, c.status);
  }
  for (const auto &chunk : bad_chunks()) {
    if (chunk.size() > 1000) { continue; } // starts the target before its end
    CAPTURE(shown(chunk));
    RawClient client(proxy.port());
    client.send(with("Transfer-Encoding: chunked") + chunk + smuggled);
    check_refused(client, 400);
  }
  CHECK(proxy.status().starts == 0);
  CHECK(proxy.status().requests == 0);
  CHECK(proxy.status().state == "cold");
}

TEST_CASE("request head: a malformed one does not reach the target") {
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
    { // nor after a good one
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

TEST_CASE("response head: a malformed one becomes 502") {
  const std::string k70(70000, 'x');
  std::vector<std::pair<std::string, std::string>> cases = {
      {"no HTTP", "Hello\r\n\r\n"},
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
      {"a 101 nobody asked for",
       "HTTP/1.1 101 Go\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n"},
      {"a head beyond 64 KB", "HTTP/1.1 200 OK\r\nX: " + k70 + "\r\n\r\n"},
      {"a head without end", "HTTP/1.1 200 " + k70},
      {"a malformed one behind an interim one",
       "HTTP/1.1 200OK\r\nContent-Length: 0\r\n\r\n"},
  };
  for (const auto &lines :
       {"X: a\0b"s, "X: a\rb"s, "Content-Length: 5\r\nContent-Length: 6"s,
        "Content-Length: 5, 6"s, "Content-Length: x"s, "Content-Length: -1"s,
        "Content-Length:"s, "Content-Length: 18446744073709551616"s,
        "Transfer-Encoding: gzip"s, "Transfer-Encoding: gzip, chunked"s,
        "Transfer-Encoding: chunked, gzip"s}) {
    cases.emplace_back(shown(lines),
                       "HTTP/1.1 200 OK\r\n" + lines + "\r\n\r\nbody");
  }
  cases.emplace_back("chunks in HTTP/1.0",
                     "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
                     "0\r\n\r\n");
  cases.emplace_back("a malformed chunk directly behind it",
                     "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
                     "x\r\n");
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

TEST_CASE("response head: a malformed one leaves the client connection open") {
  std::atomic<int> n{0};
  Stage stage(answering_with([&](const std::string &, const std::string &) {
    return n++ % 2 ? ok("good") : "HTTP/1.1 200 OK\r\nX: \r1\r\n\r\n";
  }));
  RawClient client(stage.port());
  for (int i = 0; i < 3; ++i) {
    CHECK(client.get().status == 502);
    CHECK(client.get().body == "good");
  }
}

// There is no body to misread, but a cache would store the wrong length.
TEST_CASE("response head: malformed framing is refused even without a body") {
  Stage stage(dictated());
  for (const std::string lines :
       {"Content-Length: x", "Content-Length: 5\r\nContent-Length: 6",
        "Content-Length:", "Transfer-Encoding: gzip"}) {
    CAPTURE(lines);
    for (const std::string method : {"HEAD", "GET"}) {
      const auto raw_response =
          "HTTP/1.1 " + std::string(method == "GET" ? "304 Same" : "200 OK") +
          "\r\n" + lines + "\r\n\r\n";
      CHECK(exchange(stage.port(), dictate(raw_response, method)).status ==
            502);
    }
  }
}
