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

TEST_CASE("forwarding: headers of proxies are not taken from clients") {
  const std::string lines = "Forwarded: for=10.0.0.1;proto=https\r\n"
                            "X-Forwarded: for=10.0.0.1\r\n"
                            "X-Real-IP: 10.0.0.1\r\n"
                            "x-forwarded-port: 443\r\n"
                            "X-Forwarded-Prefix: /evil\r\n"
                            "X-Forwarded-Scheme: https\r\n"
                            "X-Forwarded-Server: evil\r\n"
                            "X_Forwarded_For: 10.0.0.1\r\n"
                            "X_Real_IP: 10.0.0.1\r\n"
                            "X-Real_IP: 10.0.0.1\r\n"
                            "Proxy: http://evil/\r\n";
  Stage stage(answering(ok()));
  CHECK(get(stage.port(), "/", lines + "Via: 1.1 x\r\n").status == 200);
  CHECK(without_forwarded(stage.last().head) ==
        "GET / HTTP/1.1\r\nHost: test\r\nVia: 1.1 x\r\n\r\n");
  std::size_t forwarded = 0;
  for (const auto &h : headers_of(stage.last().head)) {
    forwarded += same_name(h.first.substr(0, 12), "X-Forwarded-");
  }
  CHECK(forwarded == 3); // -For, -Host, -Proto
}

TEST_CASE("forwarding: an ignored X-Forwarded-Proto: https is logged once") {
  Stage stage(answering(ok()));
  for (int i = 0; i < 3; ++i) {
    CHECK(get(stage.port(), "/", "X-Forwarded-Proto: https\r\n").status == 200);
  }
  CHECK(stage.proxy.logged("WARMPROXY_TRUST_PROXY"));
  std::size_t lines = 0;
  for (const auto &line : stage.proxy.log_lines()) {
    lines += has(line, "WARMPROXY_TRUST_PROXY");
  }
  CHECK(lines == 1);
}

TEST_CASE("forwarding: with trust_proxy the headers of a proxy are kept") {
  Stage stage(answering(ok()), [](warmproxy::Options &options) {
    options.trust_proxy = true;
    options.strip_prefix = "/app";
  });
  const auto sent = [&](const std::string &lines,
                        const std::string &target = "/") {
    CHECK(get(stage.port(), target, lines).status == 200);
    return headers_of(stage.last().head);
  };
  SUBCASE("none: filled in") {
    const auto headers = sent("");
    CHECK(header_of(headers, "X-Forwarded-For") == "127.0.0.1");
    CHECK(header_of(headers, "X-Forwarded-Host") == "test");
    CHECK(header_of(headers, "X-Forwarded-Proto") == "http");
  }
  SUBCASE("all") {
    const auto headers =
        sent("X-Forwarded-Proto: https\r\nX-Forwarded-Host: example.org\r\n"
             "X-Forwarded-Port: 443\r\nX-Real-IP: 192.0.2.7\r\n"
             "X-Forwarded-For: 192.0.2.7\r\n");
    CHECK(header_of(headers, "X-Forwarded-Proto") == "https");
    CHECK(header_of(headers, "X-Forwarded-Host") == "example.org");
    CHECK(header_of(headers, "X-Forwarded-Port") == "443");
    CHECK(header_of(headers, "X-Real-IP") == "192.0.2.7");
    CHECK(header_of(headers, "X-Forwarded-For") == "192.0.2.7, 127.0.0.1");
    CHECK(header_of(headers, "Host") == "test");
  }
  SUBCASE("several X-Forwarded-For lines are joined") {
    const auto headers = sent("X-Forwarded-For: 192.0.2.7\r\nA: 1\r\n"
                              "x-forwarded-for: 192.0.2.8, 192.0.2.9\r\n");
    CHECK(count_of(headers, "X-Forwarded-For") == 1);
    CHECK(header_of(headers, "X-Forwarded-For") ==
          "192.0.2.7, 192.0.2.8, 192.0.2.9, 127.0.0.1");
  }
  SUBCASE("Forwarded replaces X-Forwarded-Proto") {
    const auto headers = sent("Forwarded: for=192.0.2.7;proto=https\r\n");
    CHECK(header_of(headers, "Forwarded") == "for=192.0.2.7;proto=https");
    CHECK(count_of(headers, "X-Forwarded-Proto") == 0);
  }
  SUBCASE("X-Forwarded-Prefix gets ours appended") {
    const auto headers = sent("X-Forwarded-Prefix: /outer\r\n", "/app/x");
    CHECK(count_of(headers, "X-Forwarded-Prefix") == 1);
    CHECK(header_of(headers, "X-Forwarded-Prefix") == "/outer, /app");
  }
  SUBCASE("Proxy is removed all the same") {
    CHECK(count_of(sent("Proxy: http://evil/\r\n"), "Proxy") == 0);
  }
}
