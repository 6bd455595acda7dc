// Request header lines: forwarded byte for byte, but for hop-by-hop ones.

#include "handlers.hpp"

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

// The header lines that arrive at the target, without Host and the forwarding
// headers.
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

TEST_CASE("request head: header lines are forwarded unchanged") {
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
      {"underscores", "X_Y: 1\r\nContent_Length: 5\r\n"},
      {"credentials",
       "Authorization: Basic YTpi\r\nProxy-Authorization: x\r\n"},
      {"a range", "Range: bytes=0-1,5-\r\nIf-Range: \"x\"\r\n"},
      {"Expect of another kind", "Expect: the-unexpected\r\n"},
      {"Via", "Via: 1.1 x\r\n"},
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
TEST_CASE("request head: hop-by-hop lines are removed") {
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
      // Without Host it would be another request.
      {"Host named", "Connection: Host\r\nA: 1\r\n", "A: 1\r\n"},
      // Removed whoever sends them.
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

TEST_CASE("request head: TE: trailers is forwarded") {
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

TEST_CASE("request head: empty lines before it are skipped") { // RFC 9112, 2.2
  Stage stage(telling());
  RawClient client(stage.port());
  client.send("\r\nGET /1 HTTP/1.1\r\nHost: test\r\n\r\n\r\n\r\n"
              "GET /2 HTTP/1.1\r\nHost: test\r\n\r\n");
  CHECK(client.read_response().body == "/1|");
  CHECK(client.read_response().body == "/2|");
}

TEST_CASE("request head: heads that arrive byte by byte") {
  const std::string raw_response =
      "HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
      "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
  Stage stage([&](TargetConnection &c) {
    while (!c.read_head().empty()) {
      for (const char byte : raw_response) {
        c.send({&byte, 1});
      }
    }
  });
  const std::string request =
      "GET /a%20b HTTP/1.1\r\nHost: test\r\nCookie: a=b\r\n\r\n";
  RawClient client(stage.port());
  for (int i = 0; i < 3; ++i) {
    for (const char byte : request) {
      client.send({&byte, 1});
    }
    CHECK(client.read_response().head ==
          "HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n");
    CHECK(client.read_response().body == "ok");
    CHECK(without_forwarded(stage.last().head) == request);
  }
}
