// Responses that end too early: the client must be able to tell.

#include "handlers.hpp"

#include <doctest/doctest.h>

using namespace support;

namespace {

// What the client gets of a truncated response.
struct Truncated {
  std::string text;
  bool reset;
};
Truncated truncated(int port, const std::string &request) {
  RawClient client(port);
  client.send(request);
  auto text = client.read_to_end();
  return {text, client.was_reset()};
}

} // namespace

// The client must be able to see that something is missing.
TEST_CASE("truncated responses: the target disappears within the body") {
  const struct {
    std::string name;
    std::string sent;
  } cases[] = {
      {"before any of it", "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n"},
      {"of a length", "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\npart"},
      {"before any chunk",
       "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"},
      {"in a chunk's size",
       "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4"},
      {"in a chunk",
       "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\npart"},
      {"behind a chunk",
       "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\npart\r\n"},
      {"behind the last chunk", "HTTP/1.1 200 OK\r\nTransfer-Encoding: "
                                "chunked\r\n\r\n4\r\npart\r\n0\r\n"},
      {"in the trailers", "HTTP/1.1 200 OK\r\nTransfer-Encoding: "
                          "chunked\r\n\r\n4\r\npart\r\n0\r\nT: 1\r\n"},
  };
  for (const auto &c : cases) {
    CAPTURE(c.name);
    for (const auto &end :
         {sending_and_closing(c.sent), sending_and_resetting(c.sent)}) {
      Stage stage(playing({end}));
      RawClient client(stage.port());
      client.send(plain);
      const auto response = client.read_response();
      CHECK(!response.complete);
      CHECK(stage.target.requests().size() == 1);

      // HTTP/1.0 clients get no framing, so only a reset can tell them.
      if (c.sent.find("chunked") != std::string::npos) {
        const auto old = truncated(stage.port(), "GET / HTTP/1.0\r\n\r\n");
        CHECK(old.reset);
      }
    }
  }
}

TEST_CASE("truncated responses: a reset does not end a close-delimited body") {
  Stage stage(playing({sending_and_resetting("HTTP/1.1 200 OK\r\n\r\npart")}));
  CHECK(truncated(stage.port(), plain).reset);
}
