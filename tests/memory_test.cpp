// Memory does not depend on the size of a body.

#include "support.hpp"

#include <doctest/doctest.h>

using namespace support;

TEST_CASE("memory: does not grow with the size of a body") {
  ServeProcess serve(serve_fake());
  const auto port = serve.port();
  CHECK(get(port).status == 200);
  const auto before = peak_rss_kb(serve.pid());
  const auto size = large_body();
  const auto n = std::to_string(size);
  const auto start = [](const std::string &method, const std::string &target) {
    return method + " " + target + " HTTP/1.1\r\nHost: test\r\n";
  };
  RawClient client(port);

  SUBCASE("down, with its length") {
    client.send(start("GET", "/bytes?n=" + n) + "\r\n");
    CHECK(client.read_response_head().header("Content-Length") == n);
    CHECK(client.verify_generated(size) == size);
    CHECK(client.get("/pid").status == 200);
  }
  SUBCASE("down, until the connection's end") {
    client.send(start("GET", "/close?n=" + n) + "\r\n");
    CHECK(client.read_response_head().status == 200);
    CHECK(client.verify_generated(size) == size);
    CHECK(client.at_end());
  }
  SUBCASE("down, in chunks") {
    client.send(start("GET", "/chunked?n=" + n) + "\r\n");
    CHECK(client.read_response_head().status == 200);
    std::uint64_t at = 0;
    for (;;) {
      const auto chunk = std::stoul(client.read_until("\r\n"), nullptr, 16);
      const auto data = client.read_exact(chunk + 2);
      if (chunk == 0) { break; }
      REQUIRE(bytes::match(data.data(), chunk, at));
      at += chunk;
    }
    CHECK(at == size);
    CHECK(client.get("/pid").status == 200);
  }
  SUBCASE("up, with its length") {
    client.send(start("POST", "/upload") + "Content-Length: " + n + "\r\n\r\n");
    CHECK(client.send_generated(size));
    const auto response = client.read_response();
    CHECK(response.status == 200);
    CHECK(response.body == n + "\n");
  }
  SUBCASE("up, in chunks") {
    client.send(start("POST", "/upload") +
                "Transfer-Encoding: chunked\r\n\r\n");
    std::string data(1 << 20, 0);
    for (std::uint64_t at = 0; at < size; at += data.size()) {
      data.resize(static_cast<std::size_t>(
          std::min<std::uint64_t>(data.size(), size - at)));
      bytes::fill(&data[0], data.size(), at);
      char length[32];
      std::snprintf(length, sizeof(length), "%zx\r\n", data.size());
      REQUIRE(client.send(length + data + "\r\n"));
    }
    CHECK(client.send("0\r\n\r\n"));
    const auto response = client.read_response();
    CHECK(response.status == 200);
    CHECK(response.body == n + "\n");
  }
  MESSAGE("peak of the resident set: ", before, " kB, then ",
          peak_rss_kb(serve.pid()), " kB");
  if (!sanitized) { CHECK(peak_rss_kb(serve.pid()) < before + 1024); }
}
