// What the target learns about the client, and what a client can make it
// believe.

#include "support.hpp"

#include <doctest/doctest.h>

using namespace support;

namespace {

bool has(const std::string &text, const std::string &part) {
  return text.find(part) != std::string::npos;
}

} // namespace

// Hop-by-hop abuse: a client lists header lines that a proxy adds.
TEST_CASE(
    "forwarding: Connection cannot remove framing or forwarding headers") {
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

TEST_CASE("forwarding: X-Forwarded-For, -Host and -Proto") {
  const std::string ours =
      "X-Forwarded-Host: test\r\nX-Forwarded-Proto: http\r\n";
  const struct {
    std::string name, sent, arrive; // sorted
  } cases[] = {
      {"none", "", "X-Forwarded-For: 127.0.0.1\r\n" + ours},
      {"a chain", "X-Forwarded-For: 1.2.3.4, 5.6.7.8\r\n",
       "X-Forwarded-For: 127.0.0.1\r\n" + ours},
      {"a chain in several lines",
       "x-forwarded-for: 1.2.3.4\r\nA: 1\r\nX-FORWARDED-FOR: 5.6.7.8\r\n",
       "X-Forwarded-For: 127.0.0.1\r\n" + ours},
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

TEST_CASE("forwarding: X-Forwarded-Host is Host, byte for byte") {
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
    const auto head = stage.last().head;
    CHECK(head.find("GET / HTTP/1.1\r\n") == 0);
    CHECK(header_of(head, "A") == "1");
    CHECK(header_of(head, "Host") ==
          "127.0.0.1:" + std::to_string(stage.target.port()));
    CHECK(count_of(headers_of(head), "X-Forwarded-Host") == 0);
  }
}

TEST_CASE("forwarding: a client cannot spoof its address, scheme or host") {
  Stage stage(answering(ok()));
  RawClient client(stage.port());
  for (const std::string spoofed :
       {"X-Forwarded-For: 10.0.0.1\r\n", "x-forwarded-for: 10.0.0.1\r\n",
        "X-Forwarded-For: 10.0.0.1\r\nX-Forwarded-For: 10.0.0.2\r\n",
        "X-Forwarded-For:\r\n", "X-Forwarded-For: ,\r\n",
        "X-Forwarded-For: 10.0.0.1\r\nConnection: X-Forwarded-For\r\n",
        "X-Forwarded-Proto: https\r\nX-Forwarded-Host: bank.example\r\n",
        "X-FORWARDED-PROTO: https\r\nx-forwarded-HOST: bank.example\r\n",
        "Connection: X-Forwarded-Proto, X-Forwarded-Host\r\n",
        "X_Forwarded_Proto: https\r\nX-Forwarded_Host: bank.example\r\n",
        "x_vercel-internal-request-id: https\r\n",
        "X-Vercel-Internal-Invocation-Id: 1\r\n",
        "x-vercel-internal-bot-check: pass\r\n"}) {
    CAPTURE(spoofed);
    CHECK(client.get("/", spoofed).status == 200);
    const auto headers = headers_of(stage.last().head);
    for (const auto &h : headers) {
      CHECK(!has(h.second, "bank.example"));
      CHECK(!has(h.second, "https"));
      CHECK(!same_name(h.first.substr(0, 18), "x-vercel-internal-"));
    }
    CHECK(count_of(headers, "X-Forwarded-For") == 1);
    CHECK(header_of(headers, "X-Forwarded-For") == "127.0.0.1");
    CHECK(count_of(headers, "X-Forwarded-Proto") == 1);
    CHECK(count_of(headers, "X-Forwarded-Host") == 1);
    CHECK(header_of(headers, "X-Forwarded-Proto") == "http");
    CHECK(header_of(headers, "X-Forwarded-Host") == "test");
  }
}
