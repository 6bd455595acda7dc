// The waiting page: for browser navigations, and for nothing else.

#include "support.hpp"

#include <doctest/doctest.h>

using namespace support;

TEST_CASE("waiting page: only navigations get it") {
  const std::string html = "Accept: text/html,application/xhtml+xml\r\n";
  const struct {
    std::string name, method, lines;
    bool page;
  } cases[] = {
      {"a navigation", "GET", "Sec-Fetch-Dest: document\r\n" + html, true},
      {"a navigation over plain http", "GET",
       "Upgrade-Insecure-Requests: 1\r\n" + html, true},
      {"a frame", "GET", "Sec-Fetch-Dest: iframe\r\n" + html, true},
      {"fetch()", "GET",
       "Sec-Fetch-Dest: empty\r\nUpgrade-Insecure-Requests: 1\r\n" + html,
       false},
      {"a feed reader", "GET",
       "Accept: application/atom+xml, application/rss+xml, text/html;q=0.5\r\n",
       false},
      {"Java", "GET", "Accept: text/html, image/gif, *; q=.2, */*; q=.2\r\n",
       false},
      {"XMLHttpRequest", "GET", "X-Requested-With: XMLHttpRequest\r\n" + html,
       false},
      {"a form", "POST",
       "Sec-Fetch-Dest: document\r\nContent-Length: 0\r\n" + html, false},
      {"curl", "GET", "Accept: */*\r\n", false},
  };
  auto options = fake_target({"--never-listen"});
  options.startup_timeout = Milliseconds(1500);
  options.stop_timeout = Milliseconds(100);
  options.waiting_page_after = Milliseconds(50);
  RunningProxy proxy(options);
  std::list<RawClient> clients;
  for (const auto &c : cases) {
    clients.emplace_back(proxy.port());
    clients.back().send(c.method + " / HTTP/1.1\r\nHost: test\r\n" + c.lines +
                        "\r\n");
  }
  auto client = clients.begin();
  for (const auto &c : cases) {
    CAPTURE(c.name);
    const auto response = (client++)->read_response();
    CHECK(response.status == (c.page ? 503 : 504));
    CHECK((response.header("Content-Type").find("text/html") == 0) == c.page);
    if (c.page) {
      // It moves on even where a Content-Security-Policy forbids its script.
      CHECK(response.header("Refresh") == "15");
    } else {
      CHECK(response.body.find("warmproxy: ") == 0);
    }
  }
}

// A target that is waited for again, as during a reload, did not start then.
TEST_CASE("waiting page: the time is that of the wait") {
  auto options = fake_target();
  options.waiting_page_after = Milliseconds(50);
  RunningProxy proxy(options);
  CHECK(get(proxy.port(), "/pid").status == 200);
  CHECK(wait_for([&] { return proxy.status().up_for > Milliseconds(3000); }));
  CHECK(RawClient(proxy.port()).post("/stop-listening", "x").status == 200);
  std::string page;
  CHECK(wait_for([&] { // the first one may find an idle connection
    page = get(proxy.port(), "/", "Sec-Fetch-Dest: document\r\n").body;
    return page.find("id=\"time\">") != std::string::npos;
  }));
  const auto time = page.substr(page.find("id=\"time\">") + 10, 2);
  CHECK((time == "0<" || time == "1<" || time == "2<"));
}

TEST_CASE("waiting page: Warmproxy-Wait counts on GET alone") {
  RunningProxy proxy(fake_target({"--listen-after", "300"}));
  const auto response =
      RawClient(proxy.port()).post("/echo", "body", "Warmproxy-Wait: 1\r\n");
  CHECK(response.status == 200);
  CHECK(response.body.find("POST /echo HTTP/1.1\r\n") == 0);
  CHECK(response.body.find("\r\n\r\nbody") != std::string::npos);
}
