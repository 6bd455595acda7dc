// How long client connections live, with HTTP/1.1 and HTTP/1.0 on either side.

#include "handlers.hpp"

#include <doctest/doctest.h>

using namespace support;

TEST_CASE("keep-alive: the connection outlives every delimited response") {
  Stage stage(dictated());
  RawClient client(stage.port());
  for (const std::string raw_response :
       {"HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\n\r\nnope",
        "HTTP/1.1 500 Oh\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 400 Bad\r\nContent-Length: 3\r\n\r\nbad",
        "HTTP/1.1 413 Large\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 204 None\r\n\r\n", "HTTP/1.1 304 Same\r\n\r\n",
        "HTTP/1.1 304 Same\r\nContent-Length: 9\r\n\r\n",
        "HTTP/1.1 502 Mine\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nT: "
        "1\r\n\r\n",
        "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 1\r\n\r\nx",
        "HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\nx"}) {
    CAPTURE(raw_response);
    const auto response = client.exchange(dictate(raw_response));
    CHECK(response.status == std::atoi(raw_response.c_str() + 9));
    CHECK(response.count("Connection") == 0);
    CHECK(client.exchange(dictate(ok("still here"))).body == "still here");
  }
}

TEST_CASE("keep-alive: HTTP/1.0 clients") {
  Stage stage(dictated());
  const auto request = [](const std::string &lines,
                          const std::string &raw_response) {
    return "POST / HTTP/1.0\r\n" + lines +
           "Content-Length: " + std::to_string(raw_response.size()) +
           "\r\n\r\n" + raw_response;
  };
  SUBCASE("closed by default") {
    RawClient client(stage.port());
    const auto response = client.exchange(request("", ok()));
    CHECK(response.head ==
          "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: "
          "close\r\n\r\n");
    CHECK(response.body == "ok");
    CHECK(client.at_end());
    // RFC 9110, section 2.5: an intermediary sends its own version.
    CHECK(stage.last().head.find("POST / HTTP/1.1\r\n") == 0);
    CHECK(header_of(stage.last().head, "Host") ==
          "127.0.0.1:" + std::to_string(stage.target.port()));
  }
  SUBCASE("kept with Connection: keep-alive") {
    RawClient client(stage.port());
    for (int i = 0; i < 3; ++i) {
      const auto response =
          client.exchange(request("connection: Keep-Alive\r\n", ok()));
      CHECK(response.head == "HTTP/1.1 200 OK\r\nContent-Length: "
                             "2\r\nConnection: keep-alive\r\n\r\n");
      CHECK(response.body == "ok");
    }
  }
  SUBCASE("no interim responses") {
    RawClient client(stage.port());
    const auto response = client.exchange(
        request("", "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early "
                    "Hints\r\nLink: </x>\r\n\r\n" +
                        ok()));
    CHECK(response.status == 200);
    CHECK(response.body == "ok");
  }
}

TEST_CASE("keep-alive: HTTP/1.0 targets") {
  SUBCASE("with a length, the client's connection stays open") {
    Stage stage(playing({sending_and_closing(
        "HTTP/1.0 200 OK\r\nContent-Length: 2\r\nServer: x\r\n\r\nok")}));
    RawClient client(stage.port());
    for (int i = 0; i < 3; ++i) {
      const auto response = client.get();
      CHECK(response.head ==
            "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nServer: x\r\n\r\n");
      CHECK(response.body == "ok");
    }
  }
  SUBCASE("with keep-alive, the upstream connection is used again") {
    Stage stage(answering("HTTP/1.0 200 OK\r\nConnection: keep-alive\r\n"
                          "Content-Length: 2\r\n\r\nok"));
    RawClient client(stage.port());
    for (int i = 0; i < 3; ++i) {
      CHECK(client.get().body == "ok");
    }
    CHECK(connections_used(stage) == 1);
  }
  SUBCASE("without a length, both connections are closed") {
    Stage stage(playing({sending_and_closing("HTTP/1.0 200 OK\r\n\r\nok")}));
    RawClient client(stage.port());
    const auto response = client.get();
    CHECK(response.head == "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n");
    CHECK(response.body == "ok");
    CHECK(response.complete);
  }
}

TEST_CASE("keep-alive: a client that half-closes after its request gets its "
          "response") {
  // A client that half-closes counts as gone after a moment, so only a prompt
  // response is certain to reach it. One of many attempts is enough.
  Stage stage(answering(ok()));
  CHECK(wait_for([&] {
    RawClient client(stage.port());
    client.send(plain);
    client.shutdown_write();
    const auto text = client.read_to_end();
    return text.find("\r\n\r\nok") != std::string::npos;
  }));
}

TEST_CASE("keep-alive: urgent data does not end the stream") {
  // All of it arrives at once, but recv(2) stops at the urgent byte.
  ServeProcess proxy(serve_fake());
  CHECK(get(proxy.port(), "/pid").status == 200);
  proxy.signal(SIGSTOP);
  RawClient client(proxy.port());
  client.send("GET /pid HTTP/1.1\r\nHo");
  CHECK(::send(client.fd(), "!", 1, MSG_OOB) == 1);
  client.send("st: test\r\n\r\n");
  proxy.signal(SIGCONT);
  CHECK(client.read_response().status == 200);
}
