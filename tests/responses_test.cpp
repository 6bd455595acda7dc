// Responses of our own, without sockets: for whom, and what is in them.

#include "../warmproxy.hpp"

#include <doctest/doctest.h>

#include <string>

using namespace warmproxy::detail;

namespace {

// A GET with these lines. Views of a head point into itself, so it stays where
// it is.
struct Asked {
  explicit Asked(const std::string &lines = "",
                 const std::string &line = "GET / HTTP/1.1") {
    REQUIRE(!parse_request(line + "\r\nHost: test\r\n" + lines + "\r\n", head));
  }
  RequestHead head;
};

const std::string navigation = "Sec-Fetch-Dest: document\r\n";
const std::string in_chinese = "Accept-Language: zh-CN,zh;q=0.9\r\n";

std::string written(const Reply &reply, const RequestHead &request,
                    const Config &config = {}, bool keep_alive = true) {
  std::string out;
  write_reply(reply, request, config, keep_alive, out);
  return out;
}

// The value of a header line, "" if there is none.
std::string value_of(const std::string &head, const std::string &name) {
  const auto at = head.find("\r\n" + name + ": ");
  if (at == std::string::npos) { return ""; }
  const auto begin = at + name.size() + 4;
  return head.substr(begin, head.find("\r\n", begin) - begin);
}

} // namespace

TEST_CASE("waiting page: for navigations and nobody else") {
  const std::string secure = "Upgrade-Insecure-Requests: 1\r\n";
  const std::string html = "Accept: text/html,*/*;q=0.8\r\n";
  const struct {
    const char *name;
    std::string lines;
    bool page;
    const char *line = "GET / HTTP/1.1";
  } cases[] = {
      {"a browser over https", navigation, true},
      {"in a frame", "Sec-Fetch-Dest: iframe\r\n", true},
      {"a browser over http", secure + html, true},
      {"fetch()", "Sec-Fetch-Dest: empty\r\n" + secure + html, false},
      {"an image", "Sec-Fetch-Dest: image\r\n" + html, false},
      {"a feed reader", html, false},
      {"Java", "Accept: text/html, image/gif, *; q=.2\r\n", false},
      {"XMLHttpRequest", "X-Requested-With: XMLHttpRequest\r\n" + html, false},
      {"no text/html", secure + "Accept: */*\r\n", false},
      {"curl", "Accept: */*\r\n", false},
      {"a form", navigation, false, "POST / HTTP/1.1"},
      {"HEAD", navigation, false, "HEAD / HTTP/1.1"},
  };
  for (const auto &c : cases) {
    CAPTURE(c.name);
    CHECK(wants_page(Asked(c.lines, c.line).head) == c.page);
  }
}

TEST_CASE("waiting page: what it says and does") {
  const Asked asked(navigation, "GET /a/b?c=\"<d> HTTP/1.1");
  const auto reply = waiting_page(asked.head, seconds(7));
  CHECK(reply.status == 503);
  CHECK(reply.type == "text/html; charset=utf-8");
  CHECK(reply.lines == "Retry-After: 2\r\nRefresh: 15\r\n");
  for (const auto part :
       {"<html lang=\"en\">", "<title>Starting up …</title>",
        "Waiting for <span id=\"time\">7</span> s",
        "content=\"2; url=./b?c=&quot;&lt;d&gt;\"", "\"Warmproxy-Wait\"",
        "Retry-After", "Try again", "color-scheme: light dark",
        "prefers-reduced-motion"}) {
    CAPTURE(part);
    CHECK(contains(reply.body, part));
  }
  for (const auto key : {"%lang", "%starting", "%asleep", "%waiting", "%failed",
                         "%again", "%seconds", "%url"}) {
    CAPTURE(key);
    CHECK(!contains(reply.body, key));
  }
}

TEST_CASE("waiting page: what looks like a placeholder stays") {
  const Asked asked(navigation, "GET /%seconds%25 HTTP/1.1");
  CHECK(contains(waiting_page(asked.head, seconds(0)).body,
                 "url=./%seconds%25\""));
  CHECK(contains(error_reply(asked.head, 502, "100%lang %reason").body,
                 "100%lang %reason"));
}

TEST_CASE("waiting page: in Chinese") {
  const Asked asked(navigation + in_chinese);
  const auto page = waiting_page(asked.head, seconds(7)).body;
  CHECK(contains(page, "<html lang=\"zh\">"));
  CHECK(contains(page, "正在启动"));
  CHECK(contains(page, "已等待 <span id=\"time\">7</span> 秒"));
  CHECK(contains(page, "重试"));
}

TEST_CASE("error reply: text, or a page") {
  const Asked program, browser(navigation), chinese(navigation + in_chinese);
  const auto text = error_reply(program.head, 503, "no <response>");
  CHECK(text.status == 503);
  CHECK(text.type == "text/plain; charset=utf-8");
  CHECK(text.body == "warmproxy: no <response>\n");
  CHECK(text.lines == "Retry-After: 1\r\n");
  const auto page = error_reply(browser.head, 503, "no <response>");
  CHECK(page.type == "text/html; charset=utf-8");
  CHECK(contains(page.body, "no &lt;response&gt;"));
  CHECK(contains(page.body, "This page could not be loaded"));
  CHECK(!contains(page.body, "http-equiv"));
  CHECK(page.lines == "Retry-After: 1\r\n");
  CHECK(contains(error_reply(chinese.head, 502, "x").body, "页面加载失败"));
}

TEST_CASE("error reply: when to try again") {
  const struct {
    int status;
    milliseconds retry_after;
    const char *lines;
  } cases[] = {
      {502, milliseconds(5000), ""},
      {503, milliseconds(0), "Retry-After: 1\r\n"},
      {503, milliseconds(1001), "Retry-After: 2\r\n"},
      {504, milliseconds(8000), "Retry-After: 8\r\n"},
  };
  const Asked program;
  for (const auto &c : cases) {
    CAPTURE(c.retry_after.count());
    const auto text =
        error_reply(program.head, c.status, "it exited", c.retry_after);
    CHECK(text.status == c.status);
    CHECK(text.lines == c.lines);
    CHECK(text.body == "warmproxy: it exited\n");
  }
}

TEST_CASE("error reply: on the wire") {
  const Asked asked;
  const auto reply = error_reply(asked.head, 502, "x");
  const auto out = written(reply, asked.head);
  CHECK(starts_with(out, "HTTP/1.1 502 Bad Gateway\r\nDate: "));
  CHECK(ends_with(out, "Content-Type: text/plain; charset=utf-8\r\n"
                       "Content-Length: 13\r\nCache-Control: no-store\r\n\r\n"
                       "warmproxy: x\n"));
  CHECK(value_of(out, "Connection") == "");
  CHECK(value_of(written(reply, asked.head, {}, false), "Connection") ==
        "close");
  const Asked old("", "GET / HTTP/1.0"), head("", "HEAD / HTTP/1.1");
  CHECK(value_of(written(reply, old.head), "Connection") == "keep-alive");
  CHECK(value_of(written(reply, head.head), "Content-Length") == "13");
  CHECK(ends_with(written(reply, head.head), "\r\n\r\n"));
}

TEST_CASE("error reply: lines of its own come first") {
  const Asked asked;
  const auto out =
      written({200, "cache-control: max-age=1\r\ndate: then\r\n", "a/b", "x"},
              asked.head);
  CHECK(out == "HTTP/1.1 200 OK\r\nContent-Type: a/b\r\nContent-Length: 1\r\n"
               "cache-control: max-age=1\r\ndate: then\r\n\r\nx");
  for (const int status : {204, 304}) {
    const auto bare = written({status, {}, "a/b", "x"}, asked.head);
    CHECK(value_of(bare, "Content-Length") == "");
    CHECK(value_of(bare, "Content-Type") == "");
    CHECK(ends_with(bare, "\r\n\r\n"));
  }
  CHECK(
      starts_with(written({299, {}, {}, {}}, asked.head), "HTTP/1.1 299 \r\n"));
}

TEST_CASE("error reply: the date") {
  CHECK(http_date(0) == "Thu, 01 Jan 1970 00:00:00 GMT");
  CHECK(http_date(784111777) == "Sun, 06 Nov 1994 08:49:37 GMT");
}

TEST_CASE("error reply: CORS") {
  Config config;
  config.cors_origins = {"https://a.example"};
  const std::string origin = "Origin: https://a.example\r\n";
  const Asked preflight(origin + "Access-Control-Request-Method: PUT\r\n"
                                 "Access-Control-Request-Headers: x, y\r\n",
                        "OPTIONS /a HTTP/1.1"),
      plain(origin, "OPTIONS /a HTTP/1.1");
  CHECK(is_preflight(preflight.head, config));
  CHECK(!is_preflight(preflight.head, {}));
  CHECK(!is_preflight(plain.head, config));
  const auto out = written({204, {}, {}, {}}, preflight.head, config);
  CHECK(starts_with(out, "HTTP/1.1 204 No Content\r\n"));
  CHECK(ends_with(out, "Vary: Origin\r\n"
                       "Access-Control-Allow-Origin: https://a.example\r\n"
                       "Access-Control-Allow-Credentials: true\r\n"
                       "Access-Control-Allow-Methods: PUT\r\n"
                       "Access-Control-Allow-Headers: x, y\r\n\r\n"));
  CHECK(value_of(written(error_reply(plain.head, 502, "x"), plain.head, config),
                 "Access-Control-Allow-Origin") == "https://a.example");
}

// The decimal point is a point in every locale.
TEST_CASE("status: durations") {
  using std::chrono::microseconds;
  const struct {
    microseconds time;
    const char *seconds, *milliseconds;
  } cases[] = {{microseconds(0), "0", "0.0"},
               {microseconds(1999), "0.001", "1.9"},
               {microseconds(250000), "0.25", "250.0"},
               {std::chrono::seconds(45), "45", "45000.0"},
               {microseconds(100200000), "100.2", "100200.0"}};
  for (const auto &c : cases) {
    CHECK(warmproxy::detail::in_seconds(c.time) == c.seconds);
    CHECK(warmproxy::detail::in_milliseconds(c.time) == c.milliseconds);
  }
}

TEST_CASE("status: JSON") {
  warmproxy::Status status;
  status.state = "up";
  status.pid = 42;
  status.port = 8080;
  status.starts = 3;
  status.last_exit = "\"9\"";
  status.up_for = milliseconds(1500);
  status.last_start = milliseconds(250);
  status.requests = 7;
  status.in_flight = 1;
  status.connections = 2;
  const auto reply = status_reply(Asked().head, status);
  CHECK(reply.type == "application/json");
  CHECK(reply.body ==
        "{\"state\":\"up\",\"pid\":42,\"port\":8080,\"starts\":3,"
        "\"last_exit\":\"\\u00229\\u0022\",\"up_seconds\":1.5,"
        "\"last_start_seconds\":0.25,\"requests\":7,\"in_flight\":1,"
        "\"connections\":2}\n");
}

TEST_CASE("status: metrics for Prometheus") {
  warmproxy::Status status;
  CHECK(
      status_reply(Asked("", "GET /s?xformat=prometheus HTTP/1.1").head, status)
          .type == "application/json");
  status.state = "up";
  status.starts = 3;
  for (const auto &asked :
       {Asked("Accept: application/openmetrics-text;q=0.5,"
              "text/plain;version=0.0.4;q=0.3\r\n")
            .head.text,
        Asked("", "GET /s?format=prometheus HTTP/1.1").head.text,
        Asked("", "GET /s?a&format=prometheus&b HTTP/1.1").head.text}) {
    RequestHead head;
    REQUIRE(!parse_request(asked, head));
    const auto reply = status_reply(head, status);
    CHECK(reply.type == "text/plain; version=0.0.4; charset=utf-8");
    CHECK(contains(reply.body,
                   "# HELP warmproxy_target_up Whether the target is up.\n"
                   "# TYPE warmproxy_target_up gauge\n"
                   "warmproxy_target_up 1\n"));
    CHECK(contains(reply.body, "# TYPE warmproxy_target_starts_total counter\n"
                               "warmproxy_target_starts_total 3\n"));
    for (const auto metric : {"target_uptime_seconds 0", "requests_total 0",
                              "target_last_start_duration_seconds 0",
                              "requests_in_flight 0", "client_connections 0"}) {
      CHECK(contains(reply.body, std::string("\nwarmproxy_") + metric + "\n"));
    }
    CHECK(!contains(reply.body, "pid"));
  }
  status.state = "starting";
  RequestHead head;
  REQUIRE(!parse_request("GET /?format=prometheus HTTP/1.1\r\nHost: a\r\n\r\n",
                         head));
  CHECK(contains(status_reply(head, status).body, "\nwarmproxy_target_up 0\n"));
}
