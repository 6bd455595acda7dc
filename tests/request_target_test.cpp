// The request line: any method, any request target, never decoded or
// normalised.

#include "support.hpp"

#include <doctest/doctest.h>

using namespace support;

namespace {

std::string first_line(const std::string &head) {
  return head.substr(0, head.find("\r\n"));
}

} // namespace

TEST_CASE("request target: forwarded unchanged") {
  const std::string k4(4096, 'k');
  const struct {
    std::string name;
    std::string target;
  } cases[] = {
      {"the root", "/"},
      {"an encoded slash", "/a%2Fb/%2f"},
      {"no UTF-8", "/%FF%fe%C0%AF"},
      {"an encoded NUL and line end", "/a%00b%0D%0AX-Injected:%201"},
      {"encoded dots", "/%2e%2E/%2e/"},
      {"encoded letters", "/%41%62c"},
      {"an encoded percent", "/100%25/%252F"},
      {"a percent that encodes nothing", "/100%/%zz/%2"},
      {"double slashes", "//"},
      {"double slashes inside", "//host//path///"},
      {"a dot segment", "/./"},
      {"dots inside", "/a/./b/../c"},
      {"above the root", "/../../etc/passwd"},
      {"trailing dots", "/a/.."},
      {"a backslash", "/a\\..\\b"},
      {"an empty query", "/?"},
      {"an empty query of a path", "/path?"},
      {"question marks", "/?a=b?c=d??"},
      {"a query like a path", "/a?/../b//c/./%2e"},
      {"a plus", "/a+b?c+d=e+f"},
      {"semicolons", "/a;v=1/b;?x;y;z"},
      {"an ampersand, empty pairs", "/?&&a&=b&c=&"},
      {"an encoded question mark and hash", "/a%3Fb%23c"},
      {"what RFC 3986 leaves out", "/a|b^c`d{e}\"<>[f]?g|h{i}[]=1"},
      {"sub-delimiters", "/!$&'()*+,;=:@-._~"},
      {"a colon first", "/:8080"},
      {"a URL as the path", "/http://example.org/x"},
      {"a URL in the query", "/?u=https://u:p@example.org:8/x?y&z"},
      {"raw UTF-8", "/\xC3\xA9t\xC3\xA9?\xE4\xB8\xAD"},
      {"raw Latin-1", "/\xE9?\xFF"},
      {"4 KB of path", "/" + k4},
      {"4 KB of query", "/?" + k4},
      {"4 KB of encodings", "/" + std::string(1365 * 3, '%')},
      {"32 KB", "/" + k4 + k4 + k4 + k4 + "?" + k4 + k4 + k4 + k4},
  };

  Stage stage(answering(ok()));
  RawClient kept(stage.port());
  for (const auto &c : cases) {
    CAPTURE(c.name);
    CHECK(get(stage.port(), c.target).status == 200);
    CHECK(first_line(stage.last().head) == "GET " + c.target + " HTTP/1.1");
    CHECK(kept.post(c.target, "body").status == 200);
    CHECK(first_line(stage.last().head) == "POST " + c.target + " HTTP/1.1");
  }
}

TEST_CASE("request target: any method is forwarded") {
  Stage stage(answering(ok()));
  RawClient client(stage.port());
  for (const std::string method :
       {"GET",
        "POST",
        "PUT",
        "DELETE",
        "PATCH",
        "OPTIONS",
        "TRACE",
        "PROPFIND",
        "PROPPATCH",
        "MKCOL",
        "COPY",
        "MOVE",
        "LOCK",
        "UNLOCK",
        "REPORT",
        "MKCALENDAR",
        "PURGE",
        "QUERY",
        "M-SEARCH",
        "PRI",
        "get",
        "Get",
        "X",
        "!#$%&'*+-.^_`|~09azAZ",
        "AMETHODTHATISLONGERTHANANYTHATISREGISTERED"}) {
    CAPTURE(method);
    CHECK(
        client.exchange(method + " /p HTTP/1.1\r\nHost: test\r\n\r\n").status ==
        200);
    CHECK(stage.last().head.find(method + " /p HTTP/1.1\r\n") == 0);
  }
  CHECK(client.exchange("HEAD /p HTTP/1.1\r\nHost: test\r\n\r\n").status ==
        200);
  CHECK(client.exchange("OPTIONS * HTTP/1.1\r\nHost: test\r\n\r\n").status ==
        200);
  CHECK(first_line(stage.last().head) == "OPTIONS * HTTP/1.1");
}

// RFC 9112, section 3.2.2: the target's authority, not Host, is what counts.
TEST_CASE("request target: absolute-form becomes origin-form") {
  const struct {
    std::string sent, host;       // by the client
    const char *target, *arrives; // at the target
  } cases[] = {
      {"http://example.org/", "example.org", "/", "example.org"},
      {"http://example.org/a%2Fb//../c?d%20e?f", "x", "/a%2Fb//../c?d%20e?f",
       "example.org"},
      {"http://example.org", "x", "/", "example.org"},
      {"http://example.org?q=/", "x", "/?q=/", "example.org"},
      {"HTTP://Example.ORG:8080/X", "x", "/X", "Example.ORG:8080"},
      {"https://example.org/", "x", "/", "example.org"},
      {"ws://example.org/chat", "x", "/chat", "example.org"},
      {"ftp://example.org/a", "x", "/a", "example.org"},
      {"a+b-c.1://example.org:81/a", "x", "/a", "example.org:81"},
      {"http://[::1]:80/", "x", "/", "[::1]:80"},
      {"http://example.org//a", "x", "//a", "example.org"},
      {"http://example.org/http://b/", "x", "/http://b/", "example.org"},
  };
  Stage stage(answering(ok()));
  for (const auto &c : cases) {
    CAPTURE(c.sent);
    CHECK(exchange(stage.port(), std::string("GET ") + c.sent +
                                     " HTTP/1.1\r\nHost: " + c.host +
                                     "\r\n\r\n")
              .status == 200);
    const auto head = stage.last().head;
    CHECK(first_line(head) == std::string("GET ") + c.target + " HTTP/1.1");
    const auto headers = headers_of(head);
    CHECK(count_of(headers, "Host") == 1);
    CHECK(header_of(headers, "Host") == c.arrives);
    CHECK(header_of(headers, "X-Forwarded-Host") == c.arrives);
  }
}

TEST_CASE("request target: absolute-form provides a missing Host") {
  Stage stage(answering(ok()));
  CHECK(exchange(stage.port(), "GET http://example.org/a HTTP/1.0\r\n\r\n")
            .status == 200);
  CHECK(first_line(stage.last().head) == "GET /a HTTP/1.1");
  CHECK(header_of(stage.last().head, "Host") == "example.org");
}

// RFC 9112, section 3.2.4: the only way for a proxy's client to say "*".
TEST_CASE("request target: OPTIONS in absolute-form becomes asterisk-form") {
  Stage stage(answering(ok()));
  CHECK(exchange(stage.port(),
                 "OPTIONS http://example.org HTTP/1.1\r\nHost: x\r\n\r\n")
            .status == 200);
  CHECK(first_line(stage.last().head) == "OPTIONS * HTTP/1.1");
}
