// What is repaired, refused or rewritten on its way: strict with clients,
// forgiving with the target.

#include "handlers.hpp"

#include <doctest/doctest.h>

using namespace support;
using namespace std::string_literals; // for bytes after a NUL

namespace {

const std::string start = "HTTP/1.1 200 OK\r\n";
const std::string chunked = "Transfer-Encoding: chunked\r\n\r\n";

// Responds to a request for "/x" with what `lines` returns for it.
ScriptedTarget::Handler
with_lines(std::function<std::string(const std::string &)> lines) {
  return answering_with([=](const std::string &head, const std::string &) {
    return ok("ok", lines(head));
  });
}

// The value of the header `name` that arrives at the client if the target sends
// `value`.
std::string arriving(const std::string &name, const std::string &value,
                     const std::string &prefix, const std::string &target = "/",
                     const std::string &host = "test") {
  std::atomic<int> port{0};
  Stage stage(with_lines([&](const std::string &) {
                auto sent = name + ": " + value + "\r\n";
                const auto at = sent.find("{port}");
                if (at != std::string::npos) {
                  sent.replace(at, 6, std::to_string(port));
                }
                return sent;
              }),
              [&](warmproxy::Options &o) { o.strip_prefix = prefix; });
  port = stage.target.port();
  return exchange(stage.port(),
                  "GET " + target + " HTTP/1.1\r\nHost: " + host + "\r\n\r\n")
      .header(name);
}

} // namespace

// ---- the target's mistakes -------------------------------------------------

TEST_CASE("response head: repaired where its meaning is clear") {
  const struct {
    std::string name, sent, arrives;
  } cases[] = {
      {"a blank before the colon",
       start + "X-A : 1\r\nContent-Length: 2\r\n\r\nok",
       start + "X-A: 1\r\nContent-Length: 2\r\n\r\nok"},
      {"a tab before the colon of Content-Length",
       start + "Content-Length\t: 2\r\n\r\nok",
       start + "Content-Length: 2\r\n\r\nok"},
      {"chunked twice",
       start + "Transfer-Encoding: chunked, chunked\r\n\r\n" +
           "2\r\nok\r\n0\r\n\r\n",
       start + chunked + "2\r\nok\r\n0\r\n\r\n"},
      {"chunked in two lines",
       start + "Transfer-Encoding: chunked\r\nTransfer-Encoding: "
               "chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
       start + chunked + "2\r\nok\r\n0\r\n\r\n"},
      {"identity",
       start + "Transfer-Encoding: identity\r\nContent-Length: 2\r\n\r\nok",
       start + "Content-Length: 2\r\n\r\nok"},
      {"a list of equal lengths", start + "Content-Length: 2, 2\r\n\r\nok",
       start + "Content-Length: 2\r\n\r\nok"},
      {"an empty line before the status line",
       "\r\n" + start + "Content-Length: 2\r\n\r\nok",
       start + "Content-Length: 2\r\n\r\nok"},
      {"blanks after a chunk size", start + chunked + "2  \r\nok\r\n0 \r\n\r\n",
       start + chunked + "2\r\nok\r\n0\r\n\r\n"},
      {"blanks before a chunk extension",
       start + chunked + "2 \t;x=y\r\nok\r\n0\r\n\r\n",
       start + chunked + "2;x=y\r\nok\r\n0\r\n\r\n"},
      {"control characters in a value",
       start + "X: a\x01\x1b[2J\x7f\r\nContent-Length: 2\r\n\r\nok",
       start + "X: a\x01\x1b[2J\x7f\r\nContent-Length: 2\r\n\r\nok"},
      {"names that are no tokens",
       start + "X Y: 1\r\nX\xE9: 2\r\n: 3\r\nX(Y): 4\r\nA: 5\r\n"
               "Content-Length: 2\r\n\r\nok",
       start + "A: 5\r\nContent-Length: 2\r\n\r\nok"},
      {"a line without a colon",
       start + "nonsense\r\nContent-Length: 2\r\n\r\nok",
       start + "Content-Length: 2\r\n\r\nok"},
      {"a folded line", start + "X: 1\r\n  2\r\nContent-Length: 2\r\n\r\nok",
       start + "X: 1 2\r\nContent-Length: 2\r\n\r\nok"},
      {"a line folded twice, with tabs",
       start + "X: 1 \r\n\t2\r\n \t3\r\nContent-Length: 2\r\n\r\nok",
       start + "X: 1 2 3\r\nContent-Length: 2\r\n\r\nok"},
      {"a folded Content-Length",
       start + "Content-Length:\r\n 2\r\nA: 1\r\n\r\nok",
       start + "Content-Length: 2\r\nA: 1\r\n\r\nok"},
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

TEST_CASE("response head: framing is judged after the repair") {
  // Removing the folded or malformed line instead would change the length.
  Stage stage(dictated());
  CHECK(exchange(stage.port(),
                 dictate(start + "Content-Length : 5\r\nContent-Length: 6\r\n"
                                 "\r\nhello"))
            .status == 502);
  CHECK(exchange(stage.port(),
                 dictate(start + "Transfer-Encoding:\r\n gzip\r\n\r\nhello"))
            .status == 502);
}

TEST_CASE("response head: the log says what was repaired or refused") {
  const struct {
    std::string sent, logged;
  } cases[] = {
      {start + "X-Odd : 1\r\nContent-Length: 2\r\n\r\nok", "X-Odd"},
      {start + "X Odd: 1\r\nContent-Length: 2\r\n\r\nok", "X Odd"},
      {start + "Content-Length: x\r\n\r\n", "Content-Length"},
      {start + "Transfer-Encoding: gzip\r\n\r\n", "Transfer-Encoding"},
      {start + "X: " + std::string(70000, 'x') + "\r\n\r\n", "too large"},
      {start + chunked + "what?\r\n", "chunk"},
  };
  Stage stage(dictated());
  for (const auto &c : cases) {
    CAPTURE(c.logged);
    RawClient client(stage.port());
    client.send(dictate(c.sent));
    client.read_response();
    CHECK(stage.proxy.logged(c.logged));
  }
}

// A target may send any number of different ones.
TEST_CASE("response head: the log has no more than a hundred such lines") {
  Stage stage(dictated());
  RawClient client(stage.port());
  std::string last;
  for (int i = 0; i < 120; ++i) {
    last = "X-" + std::to_string(i);
    const auto sent = start + last + " : 1\r\nContent-Length: 2\r\n\r\nok";
    CHECK(client.exchange(dictate(sent)).header(last) == "1");
  }
  const auto lines = stage.proxy.log_lines();
  CHECK(std::count_if(lines.begin(), lines.end(), [](const auto &line) {
          return line.find("response repaired: ") != line.npos;
        }) == 100);
}

// ---- the client's ----------------------------------------------------------

// They would otherwise be waited for until the head's time limit of 30 s.
TEST_CASE(
    "request head: bytes that cannot become a request are refused at once") {
  const Milliseconds much_less{10000};
  Stage stage(answering(ok()));
  for (const auto &bytes :
       {"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"s, // a TLS ClientHello
        "\x16\x03\x03\x00\x7a\x01"s, "\0\0\0\0"s, "\x80\x2e\x01"s, "GET /\n"s,
        "{\"a\": 1}\r\n"s, "GET\t/"s, "GET  / x "s, "SSH-2.0-OpenSSH_9.2\r\n"s,
        "GET foo HTTP/1.1\r\n"s, "OPTIONS * RTSP/1.0\r\n"s,
        "GET / HTTP/1.1\r\nHost : a\r\n"s,
        "GET / HTTP/1.1\r\nHost: a\r\nX: \x01\r\n"s}) {
    CAPTURE(bytes);
    RawClient client(stage.port());
    client.send(bytes);
    const auto response = client.read_response(false, much_less);
    CHECK(response.status == 400);
    CHECK(response.header("Connection") == "close");
    CHECK(response.body.find("warmproxy: ") == 0);
  }
  CHECK(stage.target.requests().empty());
}

TEST_CASE("request head: h2c and TLS upgrades are not forwarded") {
  Stage stage(answering(ok()));
  const auto sent = [&](const std::string &lines) {
    RawClient client(stage.port());
    CHECK(client.get("/", lines).body == "ok");
    return stage.last().head;
  };
  for (const std::string lines :
       {"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
        "HTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n",
        "Connection: Upgrade\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n",
        "Connection: upgrade\r\nUpgrade: TLS/1.2, H2C\r\n",
        "Connection: upgrade\r\nUpgrade: tls/1.0\r\n"}) {
    CAPTURE(lines);
    const auto headers = headers_of(sent(lines));
    CHECK(count_of(headers, "Upgrade") == 0);
    CHECK(count_of(headers, "Connection") == 0);
    CHECK(count_of(headers, "HTTP2-Settings") == 0);
  }
  const auto headers =
      headers_of(sent("Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c, "
                      "websocket\r\nHTTP2-Settings: AAMAAABk\r\n"));
  CHECK(header_of(headers, "Upgrade") == "websocket");
  CHECK(header_of(headers, "Connection") == "Upgrade");
  CHECK(count_of(headers, "HTTP2-Settings") == 0);
}

// ---- Location and Destination ----------------------------------------------

TEST_CASE("Location: the target's port becomes the client's authority") {
  const struct {
    std::string host, sent, arrives;
  } cases[] = {
      {"example.org", "http://example.org:{port}/dir/",
       "http://example.org/dir/"},
      {"example.org:8443", "http://127.0.0.1:{port}/a?b#c",
       "http://example.org:8443/a?b#c"},
      {"example.org", "http://localhost:{port}", "http://example.org"},
      {"example.org", "http://[::1]:{port}/", "http://example.org/"},
      {"example.org", "http://example.org.evil:{port}/",
       "http://example.org.evil:{port}/"},
      {"example.org", "http://127.0.0.1:1/", "http://127.0.0.1:1/"},
      {"example.org", "http://127.0.0.1/", "http://127.0.0.1/"},
      {"example.org", "http://elsewhere:{port}/", "http://elsewhere:{port}/"},
      {"example.org", "/login", "/login"},
      {"example.org", "//elsewhere/", "//elsewhere/"},
      {"example.org", "login", "login"},
      {"example.org", "mailto:a@example.org", "mailto:a@example.org"},
  };
  for (const auto &c : cases) {
    CAPTURE(c.sent);
    for (const std::string name : {"Location", "Content-Location"}) {
      const auto value = arriving(name, c.sent, "", "/", c.host);
      if (c.arrives.find("{port}") == std::string::npos) {
        CHECK(value == c.arrives);
      } else {
        const auto begin = c.arrives.substr(0, c.arrives.find("{port}"));
        CHECK(value.compare(0, begin.size(), begin) == 0);
      }
    }
  }
}

TEST_CASE("strip_prefix: Location gets the prefix back") {
  const struct {
    std::string sent, arrives;
  } cases[] = {
      {"/login", "/app/login"},
      {"/", "/app/"},
      {"/app", "/app"},
      {"/app/x", "/app/x"},
      {"/app?x", "/app?x"},
      {"/appx", "/app/appx"},
      {"//elsewhere/app", "//elsewhere/app"},
      {"login", "login"},
      {"?page=2", "?page=2"},
      {"http://test/login", "http://test/app/login"},
      {"http://test/app/login", "http://test/app/login"},
      {"http://127.0.0.1:{port}/login", "http://test/app/login"},
      {"http://elsewhere/login", "http://elsewhere/login"},
      {"http://test.elsewhere/login", "http://test.elsewhere/login"},
  };
  for (const auto &c : cases) {
    CAPTURE(c.sent);
    CHECK(arriving("Location", c.sent, "/app", "/app/x") == c.arrives);
    CHECK(arriving("Content-Location", c.sent, "/app", "/app/x") == c.arrives);
  }
  // Nothing was stripped from this one.
  CHECK(arriving("Location", "/login", "/app", "/appx") == "/login");
  CHECK(arriving("Link", "</login>", "/app", "/app/x") == "</login>");
}

TEST_CASE("strip_prefix: WebDAV's Destination loses the prefix") {
  const struct {
    std::string sent, arrives;
  } cases[] = {
      {"http://test/app/b%20c", "http://test/b%20c"},
      {"http://TEST/app/b", "http://TEST/b"},
      {"http://test/app", "http://test/"},
      {"/app/b", "/b"},
      {"/appx/b", "/appx/b"},
      {"http://test/b", "http://test/b"},
      {"http://test:81/app/b", "http://test:81/app/b"},
      {"http://elsewhere/app/b", "http://elsewhere/app/b"},
  };
  Stage stage(answering(ok()),
              [](warmproxy::Options &o) { o.strip_prefix = "/app"; });
  for (const auto &c : cases) {
    CAPTURE(c.sent);
    for (const std::string method : {"COPY", "MOVE"}) {
      CHECK(exchange(stage.port(),
                     method +
                         " /app/a HTTP/1.1\r\nHost: test\r\nDestination: " +
                         c.sent + "\r\n\r\n")
                .status == 200);
      CHECK(stage.last().head.find(method + " /a HTTP/1.1\r\n") == 0);
      CHECK(header_of(stage.last().head, "Destination") == c.arrives);
    }
  }
}

// ---- cdn_cache -------------------------------------------------------------

TEST_CASE("cdn_cache: only what no visitor has for himself") {
  const std::string css = "Content-Type: text/css\r\n";
  const struct {
    std::string name, target, request, response;
    bool cached;
  } cases[] = {
      {"a style sheet", "/a", "", css, true},
      {"a script", "/a", "", "Content-Type: text/javascript\r\n", true},
      {"no type, a telling ending", "/x.css", "", "", true},
      {"a page with such an ending", "/account/x.css", "Cookie: a=b\r\n",
       "Content-Type: text/html\r\n", false},
      {"with Authorization", "/x.css", "Authorization: Basic YTpi\r\n", css,
       false},
      {"Vary: Cookie", "/x.css", "", css + "Vary: Accept, cookie\r\n", false},
      {"Vary: *", "/x.css", "", css + "Vary: *\r\n", false},
      {"Vary: Accept-Encoding", "/x.css", "", css + "Vary: Accept-Encoding\r\n",
       true},
      {"no-store", "/x.css", "", css + "Cache-Control: no-store\r\n", false},
      {"private", "/x.css", "", css + "Cache-Control: max-age=9, Private\r\n",
       false},
      {"no-cache", "/x.css", "", css + "Cache-Control: no-cache\r\n", false},
      {"no-store in a folded line", "/x.css", "",
       css + "Cache-Control: max-age=9,\r\n no-store\r\n", false},
      {"an image", "/x.png", "", "Content-Type: image/png\r\n", false},
  };
  std::mutex mutex;
  std::string lines;
  Stage stage(
      with_lines([&](const std::string &) {
        const std::lock_guard<std::mutex> lock(mutex);
        return lines;
      }),
      [](warmproxy::Options &o) { o.cdn_cache = std::chrono::hours(1); });
  for (const auto &c : cases) {
    CAPTURE(c.name);
    {
      const std::lock_guard<std::mutex> lock(mutex);
      lines = c.response;
    }
    const auto response = get(stage.port(), c.target, c.request);
    CHECK(response.body == "ok");
    CHECK(response.header("CDN-Cache-Control") ==
          (c.cached ? "public, max-age=3600" : ""));
  }
}
