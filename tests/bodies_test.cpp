// Bodies are forwarded byte for byte, however they are framed.

#include "support.hpp"

#include <doctest/doctest.h>

using namespace support;
using namespace std::string_literals; // for bytes after a NUL

namespace {

std::string generated(std::size_t n) {
  std::string text(n, '\0');
  bytes::fill(&text[0], n, 0);
  return text;
}

// In chunks of `size` bytes.
std::string chunked(std::string_view body, std::size_t size,
                    const std::string &extension = "",
                    const std::string &trailers = "") {
  std::ostringstream out;
  out << std::hex;
  while (!body.empty()) {
    const auto chunk = body.substr(0, size);
    out << chunk.size() << extension << "\r\n" << chunk << "\r\n";
    body.remove_prefix(chunk.size());
  }
  out << 0 << extension << "\r\n" << trailers << "\r\n";
  return out.str();
}

std::string length_of(const std::string &body) {
  return "Content-Length: " + std::to_string(body.size()) + "\r\n";
}
const std::string in_chunks = "Transfer-Encoding: chunked\r\n";

const std::string gzip_ok = // "ok"
    "\x1f\x8b\x08\0\0\0\0\0\0\x03\xcb\xcf\x06\0\x47\xdd\xdc\x79\x02\0\0\0"s;
const std::string gzip_broken("\x1f\x8b\x08 and no more of it");
const std::string multipart =
    "--b\r\nContent-Disposition: form-data; name=\"f\"; filename=\"a\r\n"
    "b\"\r\nContent-Type: application/octet-stream\r\n\r\n\0\r\n--b-\r\n--b\r\n"
    "Content-Disposition: form-data; name=\"g\"\r\n\r\n\xFF\r\n--b--\r\n"
    "epilogue"s;

struct Body {
  std::string name;
  std::string lines, raw;
};

// Bodies of requests and responses, in every framing.
std::vector<Body> bodies() {
  const auto all = generated(100000);
  std::string every_byte;
  for (int c = 0; c < 256; ++c) {
    every_byte += static_cast<char>(c);
  }
  std::string form = "a=%20b";
  while (form.size() < 200000) {
    form += "&name%5B%5D=v+" + std::to_string(form.size());
  }
  return {
      {"empty", length_of(""), ""},
      {"one byte", length_of("x"), "x"},
      {"every byte", length_of(every_byte), every_byte},
      {"only line ends", length_of("\r\n\r\n\r\n"), "\r\n\r\n\r\n"},
      {"like a message", length_of("GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
       "GET / HTTP/1.1\r\nHost: x\r\n\r\n"},
      {"like a chunk", length_of("5\r\nhello\r\n0\r\n\r\n"),
       "5\r\nhello\r\n0\r\n\r\n"},
      {"100 KB", length_of(all), all},
      {"gzip", "Content-Encoding: gzip\r\n" + length_of(gzip_ok), gzip_ok},
      {"no gzip at all", "Content-Encoding: gzip\r\n" + length_of(gzip_broken),
       gzip_broken},
      {"brotli, or not", "Content-Encoding: br\r\n" + length_of(all), all},
      {"an unknown coding", "Content-Encoding: x, y\r\n" + length_of("z"), "z"},
      {"gzip in chunks", "Content-Encoding: gzip\r\n" + in_chunks,
       chunked(gzip_ok, 7)},
      {"multipart",
       "Content-Type: multipart/form-data; boundary=b\r\n" +
           length_of(multipart),
       multipart},
      {"multipart of no boundary",
       "Content-Type: multipart/form-data\r\n" + length_of("--"), "--"},
      {"a form",
       "Content-Type: application/x-www-form-urlencoded\r\n" + length_of(form),
       form},
      {"a form in chunks",
       "Content-Type: application/x-www-form-urlencoded\r\n" + in_chunks,
       chunked(form, 8191)},
      {"no chunk", in_chunks, "0\r\n\r\n"},
      {"one chunk", in_chunks, chunked(every_byte, 256)},
      {"chunks of a byte", in_chunks, chunked(every_byte, 1)},
      {"one large chunk", in_chunks, chunked(all, all.size())},
      {"chunks of odd sizes", in_chunks, chunked(all, 4093)},
      {"zeros before and behind", in_chunks, "0002\r\nab\r\n0000\r\n\r\n"},
      {"sizes in either case", in_chunks,
       "a\r\n0123456789\r\nB\r\n0123456789a\r\n0\r\n\r\n"},
      {"chunks of line ends", in_chunks,
       "4\r\n\r\n\r\n\r\n2\r\n\r\n\r\n0\r\n\r\n"},
      {"chunks of chunks", in_chunks, chunked("5\r\nhello\r\n0\r\n\r\n", 5)},
      {"extensions", in_chunks, chunked("hello", 2, ";a;b=c;d=\"e\"")},
      {"a quoted extension", in_chunks,
       "2;a=\"; \\\" 0\";b\r\nab\r\n0;c\r\n\r\n"},
      {"a long extension", in_chunks,
       chunked("hello", 5, ";x=" + std::string(4000, 'x'))},
      {"trailers", "Trailer: X-Sum, Y\r\n" + in_chunks,
       chunked("hello", 5, "", "X-Sum:  1 \r\nY:\r\nx-sum: \xFF\r\n")},
      {"trailers nobody announced", in_chunks,
       chunked("hello", 5, ";z", "Content-MD5: x\r\n")},
  };
}

} // namespace

TEST_CASE("bodies: a request body arrives byte for byte") {
  Stage stage(answering(ok()));
  for (const auto &body : bodies()) {
    CAPTURE(body.name);
    for (const std::string method :
         {"POST", "PUT", "PATCH", "GET", "DELETE", "OPTIONS", "PROPFIND"}) {
      CAPTURE(method);
      const auto head = method + " /b HTTP/1.1\r\nHost: test\r\n" + body.lines;
      const auto response = exchange(stage.port(), head + "\r\n" + body.raw);
      CHECK(response.status == 200);
      const auto request = stage.last();
      CHECK(without_forwarded(request.head) == head + "\r\n");
      CHECK((request.body == body.raw));
    }
  }
  CHECK(stage.target.errors().empty());
}

TEST_CASE("bodies: a request without a body stays without") {
  Stage stage(answering(ok()));
  RawClient client(stage.port());
  for (const std::string method : {"POST", "PUT", "GET", "DELETE", "PATCH"}) {
    CAPTURE(method);
    const auto head = method + " / HTTP/1.1\r\nHost: test\r\nA: 1\r\n\r\n";
    CHECK(client.exchange(head).status == 200);
    CHECK(without_forwarded(stage.last().head) == head);
  }
}

TEST_CASE("bodies: a response body arrives byte for byte") {
  auto all = bodies();
  const auto part = [](const std::string &lines, const std::string &body) {
    return lines + length_of(body);
  };
  const std::string ranges = "--r\r\nContent-Range: bytes 0-0/9\r\n\r\na\r\n"
                             "--r\r\nContent-Range: bytes 8-8/9\r\n\r\nz\r\n"
                             "--r--\r\n";
  all.push_back(
      {"one range", part("Content-Range: bytes 2-3/9\r\n", "cd"), "cd"});
  all.push_back(
      {"several ranges",
       part("Content-Type: multipart/byteranges; boundary=r\r\n", ranges),
       ranges});
  Stage stage(dictated());
  for (const auto &body : all) {
    CAPTURE(body.name);
    RawClient client(stage.port());
    for (const std::string status :
         {"200 OK", "206 Partial", "404 No", "500 E"}) {
      CAPTURE(status);
      const auto head = "HTTP/1.1 " + status + "\r\n" + body.lines + "\r\n";
      // With a Range, which must not be applied a second time.
      const auto raw = head + body.raw;
      const auto response =
          client.exchange("GET / HTTP/1.1\r\nHost: test\r\nRange: "
                          "bytes=2-3\r\nAccept-Encoding: "
                          "identity\r\n" +
                          length_of(raw) + "\r\n" + raw);
      CHECK(response.complete);
      CHECK(response.head == head);
      CHECK((response.raw_body == body.raw));
    }
  }
}

TEST_CASE("bodies: close-delimited responses") {
  Stage stage(dictated());
  for (const auto &body :
       {std::string(), std::string("x"), generated(100000), gzip_broken,
        std::string("5\r\nhello\r\n0\r\n\r\n")}) {
    CAPTURE(body.size());
    for (const std::string version : {"1.0", "1.1"}) {
      const auto response =
          exchange(stage.port(),
                   dictate("HTTP/" + version + " 200 OK\r\nA: 1\r\n\r\n" + body,
                           "POST", "/close"));
      CHECK(response.head ==
            "HTTP/1.1 200 OK\r\nA: 1\r\nConnection: close\r\n\r\n");
      CHECK((response.body == body));
      CHECK(response.complete);
    }
  }
}

// Around whatever a buffer's size may be, in both directions at once.
TEST_CASE("bodies: sizes around those of buffers") {
  Stage stage(
      answering_with([](const std::string &head, const std::string &raw) {
        const bool chunks = !header_of(head, "Transfer-Encoding").empty();
        return "HTTP/1.1 200 OK\r\n" + (chunks ? in_chunks : length_of(raw)) +
               "\r\n" + raw;
      }));
  RawClient client(stage.port());
  for (const std::size_t base :
       {2u, 1024u, 4096u, 8192u, 16384u, 32768u, 65536u, 131072u, 1048576u}) {
    for (const auto size : {base - 1, base, base + 1}) {
      CAPTURE(size);
      const auto body = generated(size);
      const auto raw_response = client.post("/", body);
      CHECK(raw_response.complete);
      CHECK((raw_response.body == body));
      const auto raw = chunked(body, std::max<std::size_t>(size / 3, 1));
      const auto echo = client.exchange("POST / HTTP/1.1\r\nHost: test\r\n" +
                                        in_chunks + "\r\n" + raw);
      CHECK(echo.complete);
      CHECK((echo.raw_body == raw));
    }
  }
}

// Where a part of a message ends must not depend on where a packet does.
TEST_CASE("bodies: a chunked request in pieces of every size") {
  Stage stage(answering_with([](const std::string &, const std::string &raw) {
    return "HTTP/1.1 200 OK\r\n" + in_chunks + "\r\n" + raw;
  }));
  const auto raw = chunked("hello, chunks", 5, ";a=\"b\"", "T: 1\r\n");
  const auto request =
      "POST / HTTP/1.1\r\nHost: test\r\n" + in_chunks + "\r\n" + raw;
  for (std::size_t size = 1; size < request.size(); ++size) {
    CAPTURE(size);
    RawClient client(stage.port());
    for (std::string_view rest = request; !rest.empty();
         rest.remove_prefix(std::min(size, rest.size()))) {
      client.send(rest.substr(0, size));
    }
    CHECK(client.read_response().raw_body == raw);
    CHECK(stage.last().body == raw);
  }
}

TEST_CASE("bodies: a chunked response in pieces of every size") {
  const auto raw_response = "HTTP/1.1 200 OK\r\nA: 1\r\n" + in_chunks + "\r\n" +
                            chunked("hello, chunks", 5, ";a=\"b\"", "T: 1\r\n");
  std::atomic<std::size_t> size{1};
  Stage stage([&](TargetConnection &c) {
    while (!c.read_head().empty()) {
      for (std::string_view rest = raw_response; !rest.empty();
           rest.remove_prefix(std::min(size.load(), rest.size()))) {
        c.send(rest.substr(0, size));
      }
    }
  });
  for (; size < raw_response.size(); ++size) {
    CAPTURE(size.load());
    RawClient client(stage.port());
    for (int i = 0; i < 2; ++i) { // what follows is not mistaken either
      const auto response = client.get();
      CHECK(response.complete);
      CHECK(response.head + response.raw_body == raw_response);
    }
  }
}

TEST_CASE("bodies: a chunked response is dechunked for HTTP/1.0 clients") {
  Stage stage(dictated());
  for (const auto &body : bodies()) {
    if (body.lines.find(in_chunks) == std::string::npos) { continue; }
    CAPTURE(body.name);
    const auto chunks =
        "HTTP/1.1 200 OK\r\nA: 1\r\n" + in_chunks + "\r\n" + body.raw;
    const auto whole = exchange(stage.port(), dictate(chunks)).body;
    const auto request = "POST / HTTP/1.0\r\nConnection: keep-alive\r\n" +
                         length_of(chunks) + "\r\n" + chunks;
    RawClient client(stage.port());
    const auto response = client.exchange(request);
    CHECK(response.head ==
          "HTTP/1.1 200 OK\r\nA: 1\r\nConnection: close\r\n\r\n");
    CHECK((response.body == whole));
    CHECK(response.complete); // and not truncated
  }
}
