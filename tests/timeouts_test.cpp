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
