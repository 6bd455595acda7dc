// Options::strip_prefix.

#include "support.hpp"

#include <doctest/doctest.h>

using namespace support;

namespace {

std::string first_line(const std::string &head) {
  return head.substr(0, head.find("\r\n"));
}

} // namespace

TEST_CASE("strip_prefix: removed on a segment boundary") {
  const struct {
    std::string sent, arrives;
    bool stripped;
  } cases[] = {
      {"/api", "/", true},
      {"/api/", "/", true},
      {"/api/x%2Fy", "/x%2Fy", true},
      {"/api?x=/api/", "/?x=/api/", true},
      {"/api//x", "//x", true},
      {"/api/api/x", "/api/x", true},
      {"/api/../x", "/../x", true},
      {"http://example.org/api/x", "/x", true},
      {"/apix", "/apix", false},
      {"/api%2Fx", "/api%2Fx", false},
      {"/API/x", "/API/x", false},
      {"/%61pi/x", "/%61pi/x", false},
      {"//api/x", "//api/x", false},
      {"/x/api/", "/x/api/", false},
      {"/?/api/", "/?/api/", false},
      {"/ap", "/ap", false},
      {"/", "/", false},
  };
  for (const std::string prefix : {"/api", "/api/", "api"}) {
    CAPTURE(prefix);
    Stage stage(answering(ok()),
                [&](warmproxy::Options &o) { o.strip_prefix = prefix; });
    for (const auto &c : cases) {
      CAPTURE(c.sent);
      CHECK(get(stage.port(), c.sent).status == 200);
      const auto head = stage.last().head;
      CHECK(first_line(head) == std::string("GET ") + c.arrives + " HTTP/1.1");
      CHECK(header_of(head, "X-Forwarded-Prefix") ==
            (c.stripped ? "/api" : ""));
    }
  }
}

TEST_CASE("strip_prefix: several segments") {
  Stage stage(answering(ok()),
              [](warmproxy::Options &o) { o.strip_prefix = "/a/b"; });
  CHECK(get(stage.port(), "/a/b/c").status == 200);
  CHECK(first_line(stage.last().head) == "GET /c HTTP/1.1");
  CHECK(get(stage.port(), "/a/bc").status == 200);
  CHECK(first_line(stage.last().head) == "GET /a/bc HTTP/1.1");
}

TEST_CASE("strip_prefix: a client cannot spoof X-Forwarded-Prefix") {
  Stage stage(answering(ok()),
              [](warmproxy::Options &o) { o.strip_prefix = "/api"; });
  CHECK(get(stage.port(), "/api/x", "X-Forwarded-Prefix: /evil\r\n").status ==
        200);
  const auto headers = headers_of(stage.last().head);
  CHECK(count_of(headers, "X-Forwarded-Prefix") == 1);
  CHECK(header_of(headers, "X-Forwarded-Prefix") == "/api");
}
