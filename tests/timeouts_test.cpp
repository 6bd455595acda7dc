// Time limits of client connections.

#include "load.hpp"

using namespace support;

TEST_CASE("timeouts: idle connections and incomplete heads") {
  if (!in_full) { return; } // it takes more than a minute
  Watched proxy(served());
  RawClient silent(proxy.port()), slow(proxy.port()), kept(proxy.port());
  slow.send("GET / HT");
  CHECK(kept.get("/pid").status == 200);
  const Milliseconds two_minutes(120000);
  const auto response = slow.read_response(false, two_minutes);
  CHECK(response.status == 408);
  CHECK(response.header("Connection") == "close");
  CHECK(silent.at_end(two_minutes));
  CHECK(kept.at_end(two_minutes));
}

TEST_CASE("timeouts: keep_alive_timeout") {
  auto environment = serve_fake();
  SUBCASE("a short one closes idle connections") {
    environment["WARMPROXY_KEEP_ALIVE_TIMEOUT"] = "300ms";
    ServeProcess proxy(environment);
    RawClient used(proxy.port()), unused(proxy.port());
    CHECK(used.get("/pid").status == 200);
    CHECK(used.at_end());
    CHECK(unused.at_end());
    // It does not limit a request.
    CHECK(get(proxy.port(), "/slow?ms=700").status == 200);
  }
  SUBCASE("0 closes none") {
    environment["WARMPROXY_KEEP_ALIVE_TIMEOUT"] = "0";
    ServeProcess proxy(environment);
    RawClient used(proxy.port()), unused(proxy.port());
    CHECK(used.get("/pid").status == 200);
    CHECK(!used.readable(Milliseconds(500)));
    CHECK(used.get("/pid").status == 200);
    CHECK(unused.get("/pid").status == 200);
  }
}

// A platform may freeze an instance between requests, for longer than any
// limit.
TEST_CASE("timeouts: what arrived while the process was stopped is served") {
  auto environment = serve_fake();
  environment["WARMPROXY_KEEP_ALIVE_TIMEOUT"] = "300ms";
  for (int i = 0; i < 3; ++i) {
    ServeProcess proxy(environment);
    CHECK(get(proxy.port(), "/pid").status == 200);
    RawClient used(proxy.port());
    CHECK(used.get("/pid").status == 200);
    proxy.signal(SIGSTOP);
    used.send(get_pid);
    RawClient fresh(proxy.port());
    fresh.send(get_pid);
    CHECK(!used.readable(Milliseconds(700)));
    proxy.signal(SIGCONT);
    CHECK(used.read_response().status == 200);
    CHECK(fresh.read_response().status == 200);
  }
}

TEST_CASE("timeouts: time in which the process was stopped does not count") {
  auto environment = serve_fake({"--listen-after", "1500"});
  environment["WARMPROXY_STARTUP_TIMEOUT"] = "3s";
  ServeProcess proxy(environment);
  RawClient client(proxy.port());
  client.send(get_pid);
  CHECK(proxy.printed("started"));
  proxy.signal(SIGSTOP);
  CHECK(!client.readable(Milliseconds(5000)));
  proxy.signal(SIGCONT);
  CHECK(client.read_response().status == 200);
}
