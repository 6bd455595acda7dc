// Response header lines: forwarded byte for byte, but for hop-by-hop ones.

#include "support.hpp"

#include <doctest/doctest.h>

using namespace support;

namespace {

const std::string k8(8192, 'v');

std::string hundred_lines() {
  std::string lines;
  for (int i = 0; i < 100; ++i) {
    lines += "X-Line-" + std::to_string(i) + ": " + std::to_string(i) + "\r\n";
  }
  return lines;
}

} // namespace

// What goes in comes out: nothing invented, nothing doubled.
TEST_CASE("response head: header lines are forwarded unchanged") {
  const struct {
    std::string name;
    std::string head, body;
  } cases[] = {
      {"as little as can be", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n", "ok"},
      {"order, case, duplicates",
       "HTTP/1.1 200 OK\r\nx-b: 1\r\nX-A: 2\r\ncontent-length: 2\r\nX-b: "
       "3\r\nx-b: 1\r\n",
       "ok"},
      {"cookies",
       "HTTP/1.1 200 OK\r\nSet-Cookie: a=%20b; Path=/\r\nContent-Length: "
       "0\r\nSet-Cookie: c=d; Expires=Thu, 01 Jan 1970 00:00:00 "
       "GMT\r\nset-cookie: a=%0D%0Ab\r\n",
       ""},
      {"date and server once",
       "HTTP/1.1 200 OK\r\nDate: Thu, 01 Jan 1970 00:00:00 GMT\r\nServer: "
       "x/1\r\nContent-Length: 0\r\n",
       ""},
      {"blanks, obs-text, empty values",
       "HTTP/1.1 200 OK\r\nA:1\r\nB:  2 \t\r\nC:\r\nD: \xE9\xFF \t x\r\n"
       "Content-Length: 2\r\n",
       "ok"},
      {"a long reason",
       "HTTP/1.1 404 Nope, not \xE9 here: sorry\r\n"
       "Content-Length: 0\r\n",
       ""},
      {"an empty reason", "HTTP/1.1 200 \r\nContent-Length: 0\r\n", ""},
      {"an unknown status", "HTTP/1.1 299 Hm\r\nContent-Length: 2\r\n", "ok"},
      {"a status of no class", "HTTP/1.1 799 Odd\r\nContent-Length: 2\r\n",
       "ok"},
      {"a redirection",
       "HTTP/1.1 302 Found\r\nLocation: "
       "http://127.0.0.1:1/%2F?a#b\r\nContent-Length: 0\r\n",
       ""},
      {"several challenges",
       "HTTP/1.1 401 No\r\nWWW-Authenticate: Basic realm=\"a\"\r\n"
       "WWW-Authenticate: Digest realm=\"b\", nonce=\"c\"\r\n"
       "Content-Length: 0\r\n",
       ""},
      {"caching",
       "HTTP/1.1 200 OK\r\nETag: W/\"x\"\r\nVary: A\r\nVary: B\r\nAge: "
       "1\r\nCache-Control: no-cache\r\nContent-Length: 0\r\n",
       ""},
      {"a kind",
       "HTTP/1.1 200 OK\r\nContent-Type: "
       "text/html;charset=\"utf-8\"\r\nContent-Length: 2\r\n",
       "ok"},
      {"CORS is the target's",
       "HTTP/1.1 200 OK\r\nAccess-Control-Allow-Origin: "
       "*\r\nContent-Length: 0\r\n",
       ""},
      {"8 KB in one",
       "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nX: " + k8 + "\r\n", ""},
      {"48 KB in six",
       "HTTP/1.1 200 OK\r\nA: " + k8 + "\r\nB: " + k8 + "\r\nC: " + k8 +
           "\r\nA: " + k8 + "\r\nB: " + k8 + "\r\nC: " + k8 +
           "\r\nContent-Length: 0\r\n",
       ""},
      {"100 lines",
       "HTTP/1.1 200 OK\r\n" + hundred_lines() + "Content-Length: 0\r\n", ""},
      {"chunked",
       "HTTP/1.1 200 OK\r\nA: 1\r\nTransfer-Encoding: "
       "chunked\r\nB: 2\r\nTrailer: T\r\n",
       "2\r\nok\r\n0\r\nT: 1\r\n\r\n"},
      {"no content", "HTTP/1.1 204 No Content\r\nA: 1\r\n", ""},
      {"not modified",
       "HTTP/1.1 304 Not Modified\r\nETag: \"x\"\r\n"
       "Content-Length: 1234\r\n",
       ""},
      {"not modified, of no length", "HTTP/1.1 304 Not Modified\r\n", ""},
      {"reset content", "HTTP/1.1 205 Reset\r\nContent-Length: 0\r\n", ""},
      {"a part",
       "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes "
       "2-3/9\r\nContent-Length: 2\r\n",
       "ok"},
      {"too much asked",
       "HTTP/1.1 416 No\r\nContent-Range: bytes "
       "*/9\r\nContent-Length: 0\r\n",
       ""},
  };
  Stage stage(dictated());
  RawClient kept(stage.port());
  for (const auto &c : cases) {
    CAPTURE(c.name);
    const auto request = dictate(c.head + "\r\n" + c.body);
    for (const auto &response :
         {exchange(stage.port(), request), kept.exchange(request)}) {
      CHECK(response.head == c.head + "\r\n");
      CHECK(response.raw_body == c.body);
      CHECK(response.complete);
    }
  }
  CHECK(stage.target.errors().empty());
}

TEST_CASE("response head: HEAD keeps its lines and has no body") {
  Stage stage(dictated());
  RawClient client(stage.port());
  for (const std::string head :
       {"HTTP/1.1 200 OK\r\nContent-Length: 1234\r\nA: 1\r\n\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nA: 1\r\n\r\n",
        "HTTP/1.1 200 OK\r\nA: 1\r\n\r\n",
        "HTTP/1.1 404 Not Found\r\nContent-Length: 9\r\n\r\n",
        "HTTP/1.1 304 Not Modified\r\nETag: \"x\"\r\n\r\n"}) {
    CAPTURE(head);
    CHECK(client.exchange(dictate(head, "HEAD")).head == head);
  }
  CHECK(client.exchange(dictate(ok("next"))).body == "next");
}

TEST_CASE("response head: hop-by-hop lines are removed") {
  const struct {
    std::string name, sent, arrives;
  } cases[] = {
      {"keep-alive",
       "A: 1\r\nConnection: keep-alive\r\nKeep-Alive: "
       "timeout=5\r\nB: 2\r\n",
       "A: 1\r\nB: 2\r\n"},
      {"named ones", "X: 1\r\nConnection: x, Y\r\nA: 1\r\ny: 2\r\nX: 3\r\n",
       "A: 1\r\n"},
      {"in several lines", "Connection: X\r\nConnection: Y\r\nY: 1\r\nX: 2\r\n",
       ""},
      {"Proxy-Connection", "Proxy-Connection: keep-alive\r\nA: 1\r\n",
       "A: 1\r\n"},
      {"an offer to upgrade", "Upgrade: h2c\r\nConnection: Upgrade\r\nA: 1\r\n",
       "A: 1\r\n"},
      {"close", "Connection: close\r\nA: 1\r\n", "A: 1\r\n"},
      {"the length named", "Connection: Content-Length, Date\r\nDate: x\r\n",
       ""},
  };
  Stage stage(dictated());
  RawClient client(stage.port());
  for (const auto &c : cases) {
    CAPTURE(c.name);
    const std::string start = "HTTP/1.1 200 OK\r\n";
    const auto response = client.exchange(
        dictate(start + c.sent + "Content-Length: 2\r\n\r\nok"));
    CHECK(response.head == start + c.arrives + "Content-Length: 2\r\n\r\n");
    CHECK(response.body == "ok");
  }
}

// They would announce a body where there is none: RFC 9112, section 6.
TEST_CASE("response head: a 204 announces no body") {
  Stage stage(dictated());
  RawClient client(stage.port());
  for (const std::string line :
       {"Content-Length: 5\r\n", "Content-Length: 0\r\n",
        "Transfer-Encoding: chunked\r\n"}) {
    CAPTURE(line);
    CHECK(
        client
            .exchange(dictate("HTTP/1.1 204 None\r\n" + line + "A: 1\r\n\r\n"))
            .head == "HTTP/1.1 204 None\r\nA: 1\r\n\r\n");
  }
  CHECK(client.exchange(dictate(ok("next"))).body == "next");
}
