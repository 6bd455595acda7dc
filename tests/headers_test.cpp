// Header lines: their order, case, number and bytes, and the few that change.

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

// What the target gets of a request's header lines, apart from Host and what
// warmproxy tells it of the client.
std::string arriving(Stage &stage, const std::string &lines) {
  const std::string start = "GET / HTTP/1.1\r\nHost: test\r\n";
  const auto response = exchange(stage.port(), start + lines + "\r\n");
  CHECK(response.status == 200);
  const auto head = without_forwarded(stage.last().head);
  CHECK(head.substr(0, start.size()) == start);
  CHECK(head.substr(head.size() - 2) == "\r\n");
  return head.substr(start.size(), head.size() - 2 - start.size());
}

} // namespace

TEST_CASE("request header lines arrive as they were sent") {
  const struct {
    std::string name;
    std::string lines;
  } cases[] = {
      {"none", ""},
      {"a browser's",
       "User-Agent: Mozilla/5.0 (X11; Linux x86_64)\r\nAccept: "
       "text/html,application/xhtml+xml;q=0.9,*/*;q=0.8\r\nAccept-Language: "
       "zh-CN,en;q=0.5\r\nAccept-Encoding: gzip, deflate, br\r\nReferer: "
       "http://test/?a%20b\r\nDNT: 1\r\nSec-Fetch-Mode: navigate\r\n"
       "Cookie: a=%20b; c=\"d\"; =e; f\r\nIf-None-Match: W/\"x\"\r\n"},
      {"order and case", "x-b: 1\r\nX-A: 2\r\nx-C: 3\r\naCCEPT: 4\r\n"},
      {"duplicates, apart", "X: 1\r\nY: 2\r\nx: 3\r\nX: 1\r\n"},
      {"several cookies", "Cookie: a=1\r\nCookie: b=2\r\ncookie: a=1\r\n"},
      {"percent signs", "X: a%20b%0D%0AY: 1%00%zz%\r\nCookie: a=%20b\r\n"},
      {"obs-text", "X: \xE9t\xE9 \xFF\x80\r\nX-Utf8: \xE4\xB8\xAD\r\n"},
      {"blanks around a value", "X:1\r\nY:   2 \t \r\nZ:\t3\r\n"},
      {"blanks within", "X: a  b\tc\r\n"},
      {"empty values", "X:\r\nY: \r\nZ:\t\r\n"},
      {"punctuation", "X: \"a, b\"; c=d, (e)\\ <f>@[g]:{h}?=#\r\n"},
      {"any token as the name", "!#$%&'*+-.^_`|~09azAZ: 1\r\n_: 2\r\n"},
      {"underscores", "X_Real_IP: 1\r\nContent_Length: 5\r\n"},
      {"credentials",
       "Authorization: Basic YTpi\r\nProxy-Authorization: x\r\n"},
      {"a range", "Range: bytes=0-1,5-\r\nIf-Range: \"x\"\r\n"},
      {"Expect of another kind", "Expect: the-unexpected\r\n"},
      {"other proxies' words", "Forwarded: for=1.2.3.4;proto=https\r\nVia: 1.1 "
                               "x\r\nX-Real-IP: 1.2.3.4\r\n"},
      {"8 KB in one", "X: " + k8 + "\r\n"},
      {"8 KB of name", k8 + ": 1\r\n"},
      {"48 KB in six", "A: " + k8 + "\r\nB: " + k8 + "\r\nC: " + k8 +
                           "\r\nA: " + k8 + "\r\nB: " + k8 + "\r\nC: " + k8 +
                           "\r\n"},
      {"100 lines", hundred_lines()},
  };
  Stage stage(answering(ok()));
  for (const auto &c : cases) {
    CAPTURE(c.name);
    CHECK(arriving(stage, c.lines) == c.lines);
  }
}

// RFC 9110, section 7.6.1.
TEST_CASE("hop-by-hop lines of a request end here") {
  const struct {
    std::string name, sent, arrives;
  } cases[] = {
      {"close", "A: 1\r\nConnection: close\r\nB: 2\r\n", "A: 1\r\nB: 2\r\n"},
      {"keep-alive", "Connection: keep-alive\r\nKeep-Alive: 300\r\n", ""},
      {"Proxy-Connection", "Proxy-Connection: keep-alive\r\nA: 1\r\n",
       "A: 1\r\n"},
      {"named ones", "X-Hop: 1\r\nA: 1\r\nConnection: x-hop\r\nX-HOP: 2\r\n",
       "A: 1\r\n"},
      {"several named",
       "Connection: X, ,y ,\tZ\r\nX: 1\r\nY: 2\r\nZ: 3\r\nW: "
       "4\r\n",
       "W: 4\r\n"},
      {"in several lines", "Connection: X\r\nX: 1\r\nconnection: Y\r\nY: 2\r\n",
       ""},
      {"named, but only alike", "Connection: X\r\nX-Y: 1\r\nXX: 2\r\nX: 3\r\n",
       "X-Y: 1\r\nXX: 2\r\n"},
      {"Upgrade without Connection", "Upgrade: websocket\r\nA: 1\r\n",
       "A: 1\r\n"},
      {"Connection without Upgrade", "Connection: Upgrade\r\nA: 1\r\n",
       "A: 1\r\n"},
      {"HTTP2-Settings without an upgrade",
       "Connection: HTTP2-Settings\r\nHTTP2-Settings: AAMAAABk\r\n", ""},
      {"other transfer codings", "TE: gzip\r\nConnection: TE\r\nA: 1\r\n",
       "A: 1\r\n"},
      {"TE unnamed", "TE: deflate;q=0.5\r\n", ""},
      // Not ours to drop, whoever asks for it: the request would be another.
      {"Host named", "Connection: Host\r\nA: 1\r\n", "A: 1\r\n"},
      // Ours, whoever sends them.
      {"Vercel's own",
       "x-vercel-internal-x: 1\r\nX-Vercel-Internal-Y: "
       "2\r\nx-vercel-id: 3\r\nx-vercel-internal: 4\r\n",
       "x-vercel-id: 3\r\nx-vercel-internal: 4\r\n"},
  };
  Stage stage(answering(ok()));
  for (const auto &c : cases) {
    CAPTURE(c.name);
    CHECK(arriving(stage, c.sent) == c.arrives);
  }
}

TEST_CASE("a client that takes trailers says so to the target") {
  Stage stage(answering(ok()));
  for (const std::string lines :
       {"TE: trailers\r\nConnection: TE\r\nA: 1\r\n",
        "A: 1\r\nConnection: close, te\r\nte: Trailers\r\n",
        "A: 1\r\nTE: gzip;q=0.5, trailers\r\nConnection: TE, keep-alive\r\n"}) {
    CAPTURE(lines);
    const auto all = headers_of("\r\n" + arriving(stage, lines));
    CHECK(same_name(header_of(all, "TE"), "trailers"));
    CHECK(header_of(all, "Connection") == "TE");
    CHECK(header_of(all, "A") == "1");
    CHECK(all.size() == 3);
  }
}

// Known as hop-by-hop abuse: a client names what a hop before us has added.
TEST_CASE("no client can take the framing or the forwarded lines away") {
  Stage stage(answering(ok()));
  const auto response =
      exchange(stage.port(), "POST / HTTP/1.1\r\nHost: test\r\n"
                             "Connection: Content-Length, X-Forwarded-For, "
                             "X-Forwarded-Host, X-Forwarded-Proto, Host\r\n"
                             "Content-Length: 4\r\n\r\nbody");
  CHECK(response.status == 200);
  const auto request = stage.last();
  const auto headers = headers_of(request.head);
  CHECK(request.body == "body");
  CHECK(header_of(headers, "Host") == "test");
  CHECK(header_of(headers, "X-Forwarded-For") == "127.0.0.1");
  CHECK(header_of(headers, "X-Forwarded-Host") == "test");
  CHECK(header_of(headers, "X-Forwarded-Proto") == "http");

  RawClient client(stage.port());
  client.send("POST / HTTP/1.1\r\nHost: test\r\nConnection: "
              "Transfer-Encoding\r\nTransfer-Encoding: chunked\r\n\r\n"
              "4\r\nbody\r\n0\r\n\r\n");
  CHECK(client.read_response().status == 200);
  CHECK(stage.last().body == "4\r\nbody\r\n0\r\n\r\n");
}

TEST_CASE("the target is told who asked, and cannot be lied to") {
  const std::string ours =
      "X-Forwarded-Host: test\r\nX-Forwarded-Proto: http\r\n";
  const struct {
    std::string name, sent, arrive; // sorted
  } cases[] = {
      {"nothing said before us", "", "X-Forwarded-For: 127.0.0.1\r\n" + ours},
      {"a chain", "X-Forwarded-For: 1.2.3.4, 5.6.7.8\r\n",
       "X-Forwarded-For: 1.2.3.4, 5.6.7.8, 127.0.0.1\r\n" + ours},
      {"a chain in several lines",
       "x-forwarded-for: 1.2.3.4\r\nA: 1\r\nX-FORWARDED-FOR: 5.6.7.8\r\n",
       "X-FORWARDED-FOR: 5.6.7.8, 127.0.0.1\r\n" + ours +
           "x-forwarded-for: 1.2.3.4\r\n"},
      {"spoofed",
       "X-Forwarded-Proto: https\r\nx-forwarded-host: evil\r\n"
       "X-Forwarded-Host: worse\r\nX-FORWARDED-PROTO: ftp\r\n",
       "X-Forwarded-For: 127.0.0.1\r\n" + ours},
  };
  Stage stage(answering(ok()));
  for (const auto &c : cases) {
    CAPTURE(c.name);
    CHECK(get(stage.port(), "/", c.sent).status == 200);
    auto headers = headers_of(stage.last().head);
    std::sort(headers.begin(), headers.end());
    std::string told;
    for (const auto &h : headers) {
      if (same_name(h.first.substr(0, 12), "X-Forwarded-")) {
        told += h.first + ": " + h.second + "\r\n";
      }
    }
    CHECK(told == c.arrive);
  }
}

TEST_CASE("the forwarded host is the one that was asked for, to the byte") {
  Stage stage(answering(ok()));
  for (const std::string host :
       {"Example.ORG", "example.org:8080", "[::1]:3000", "127.0.0.1"}) {
    CAPTURE(host);
    CHECK(exchange(stage.port(),
                   "GET / HTTP/1.1\r\nhOST:" + host + "\r\nA: 1\r\n\r\n")
              .status == 200);
    const auto head = stage.last().head;
    CHECK(without_forwarded(head) ==
          "GET / HTTP/1.1\r\nhOST:" + host + "\r\nA: 1\r\n\r\n");
    CHECK(header_of(head, "X-Forwarded-Host") == host);
  }
  SUBCASE("an empty one") {
    CHECK(exchange(stage.port(), "GET / HTTP/1.1\r\nHost:\r\n\r\n").status ==
          200);
    CHECK(without_forwarded(stage.last().head) ==
          "GET / HTTP/1.1\r\nHost:\r\n\r\n");
  }
  SUBCASE("none, in HTTP/1.0") {
    CHECK(exchange(stage.port(), "GET / HTTP/1.0\r\nA: 1\r\n\r\n").status ==
          200);
    CHECK(without_forwarded(stage.last().head) ==
          "GET / HTTP/1.0\r\nA: 1\r\n\r\n");
    CHECK(count_of(headers_of(stage.last().head), "X-Forwarded-Host") == 0);
  }
}

TEST_CASE("a spoofed prefix does not stand beside ours") {
  Stage stage(answering(ok()),
              [](warmproxy::Options &o) { o.strip_prefix = "/api"; });
  CHECK(get(stage.port(), "/api/x", "X-Forwarded-Prefix: /evil\r\n").status ==
        200);
  const auto headers = headers_of(stage.last().head);
  CHECK(count_of(headers, "X-Forwarded-Prefix") == 1);
  CHECK(header_of(headers, "X-Forwarded-Prefix") == "/api");
}

// What goes in comes out: nothing invented, nothing doubled.
TEST_CASE("an answer's head arrives as the target sent it") {
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

TEST_CASE("an answer to HEAD keeps its lines and has no body") {
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

TEST_CASE("hop-by-hop lines of an answer end here") {
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
TEST_CASE("an answer that can have no body announces none") {
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

TEST_CASE("only an answer that had to wait for the target says so") {
  ScriptedTarget target(answering(ok("ok", "Server-Timing: db;dur=1\r\n")));
  RunningProxy proxy(attached(target));
  RawClient client(proxy.port());
  const auto cold = client.get();
  CHECK(cold.header("Server-Timing") == "db;dur=1");
  CHECK(cold.count("Server-Timing") == 2);
  CHECK(cold.headers.back().second.find("warmproxy;desc=\"cold start\";dur=") ==
        0);
  CHECK(client.get().head ==
        "HTTP/1.1 200 OK\r\nServer-Timing: db;dur=1\r\nContent-Length: "
        "2\r\n\r\n");
}
