// Pipelined requests on one client connection.

#include "handlers.hpp"

#include <doctest/doctest.h>

#include <future>

using namespace support;

TEST_CASE("pipelining: responses come in the order of the requests") {
  Stage stage(telling());
  std::string all;
  for (int i = 0; i < 200; ++i) {
    const auto n = std::to_string(i);
    if (i % 4 == 0) {
      all += "GET /" + n + " HTTP/1.1\r\nHost: test\r\n\r\n";
    } else if (i % 4 == 1) {
      all += "POST /" + n +
             " HTTP/1.1\r\nHost: test\r\nContent-Length: 6\r\n\r\n" + "GET /\r";
    } else if (i % 4 == 2) {
      all += "PUT /" + n +
             " HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: "
             "chunked\r\n\r\n3\r\nGET\r\n0\r\nT: 1\r\n\r\n";
    } else {
      all += "HEAD /" + n + " HTTP/1.1\r\nHost: test\r\n\r\n";
    }
  }
  const auto check = [&](RawClient &client) {
    const char *bodies[] = {"", "GET /\r", "3\r\nGET\r\n0\r\nT: 1\r\n\r\n", ""};
    for (int i = 0; i < 200; ++i) {
      CAPTURE(i);
      const auto response = client.read_response(i % 4 == 3);
      CHECK(response.status == 200);
      CHECK(response.body ==
            (i % 4 == 3 ? "" : "/" + std::to_string(i) + "|" + bodies[i % 4]));
    }
  };
  SUBCASE("in one piece") {
    RawClient client(stage.port());
    client.send(all);
    check(client);
  }
  SUBCASE("in pieces that end anywhere") {
    RawClient client(stage.port());
    const auto sender = std::async(std::launch::async, [&] {
      std::size_t size = 1;
      for (std::string_view rest = all; !rest.empty();) {
        const auto piece = rest.substr(0, size);
        client.send(piece);
        rest.remove_prefix(piece.size());
        size = size % 97 + 1;
      }
    });
    RawClient &reader = client;
    check(reader);
    sender.wait();
  }
}

TEST_CASE("pipelining: bytes after Connection: close are ignored") {
  Stage stage(telling());
  RawClient client(stage.port());
  client.send("GET /1 HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n"
              "GET /2 HTTP/1.1\r\nHost: test\r\n\r\n");
  const auto response = client.read_response();
  CHECK(response.body == "/1|");
  CHECK(response.header("Connection") == "close");
  CHECK(client.at_end());
  CHECK(stage.target.requests().size() == 1);
}
