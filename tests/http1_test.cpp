// HTTP/1 heads and framing, without sockets: what comes in and what becomes of
// it, side by side.

#include "../warmproxy.hpp"

#include <doctest/doctest.h>

#include <string>
#include <vector>

using namespace warmproxy::detail;
using namespace std::string_literals; // for bytes behind a NUL

namespace {

// A head of these lines, and what was read of it.
std::string head_of(const std::string &first, const std::string &lines) {
  return first + "\r\n" + lines + "\r\n";
}

std::string refusal_of(const std::string &text) {
  RequestHead head;
  const auto refusal = parse_request(text, head);
  return refusal ? decimal(refusal.status) + " " + refusal.reason : "";
}

const char *name_of(Framing::Mode mode) {
  switch (mode) {
  case Framing::Mode::none: return "none";
  case Framing::Mode::length: return "length";
  case Framing::Mode::chunked: return "chunked";
  case Framing::Mode::until_close: return "until close";
  case Framing::Mode::tunnel: break;
  }
  return "tunnel";
}

std::string lines_of(const Head &head) {
  std::string lines;
  for (const auto &field : head.fields) {
    const bool framing =
        field.is("Content-Length") || field.is("Transfer-Encoding");
    lines += framing ? concat(field.name, ": ", field.value)
                     : std::string(field.line);
    lines += "\r\n";
  }
  return lines;
}

// All the cases share these; each changes what it needs.
struct Situation {
  Config config;
  std::string client = "192.0.2.7";

  Forwarding forwarding() const { return {config, client, {false, 8080}}; }
};

Situation trusting() {
  Situation setting;
  setting.config.trust_proxy = true;
  return setting;
}

Situation on_vercel() {
  Situation setting;
  setting.config.on_vercel = true;
  return setting;
}

Situation stripping(Situation setting = {}) {
  setting.config.prefix = "/app";
  return setting;
}

// The head that the target gets for this request.
std::string forwarded(const std::string &text, const Situation &setting = {}) {
  RequestHead head;
  const auto refusal = parse_request(text, head);
  REQUIRE(refusal.status == 0);
  std::string out;
  HeadWriter(head, setting.forwarding(), out).write_request();
  return out;
}

// The same for a GET with these lines, without request line and Host.
std::string forwarded_lines(const std::string &lines,
                            const Situation &setting = {}) {
  const auto out =
      forwarded(head_of("GET / HTTP/1.1", "Host: test\r\n" + lines), setting);
  const std::string start = "GET / HTTP/1.1\r\nHost: test\r\n";
  REQUIRE(out.substr(0, start.size()) == start);
  return out.substr(start.size(), out.size() - start.size() - 2);
}

// The head that the client gets for a request and its response.
std::string answered(const std::string &request, const std::string &response,
                     const Situation &setting = {}) {
  RequestHead asked;
  REQUIRE(parse_request(request, asked).status == 0);
  ResponseHead head;
  REQUIRE(parse_response(response, asked.method, head).status == 0);
  std::string out;
  HeadWriter(asked, setting.forwarding(), out).write_response(head, true, "");
  return out;
}

const std::string any_request = "GET / HTTP/1.1\r\nHost: test\r\n\r\n";
const std::string ours = "X-Forwarded-For: 192.0.2.7\r\n"
                         "X-Forwarded-Proto: http\r\n"
                         "X-Forwarded-Host: test\r\n";

} // namespace

// ---- Requests

TEST_CASE("request head: the request target in its forms") {
  const struct {
    const char *line, *method, *target, *authority;
  } cases[] = {
      {"GET / HTTP/1.1", "GET", "/", ""},
      {"GET /a?b=/c HTTP/1.1", "GET", "/a?b=/c", ""},
      {"GET //host/x HTTP/1.1", "GET", "//host/x", ""},
      {"GET /http://b/ HTTP/1.1", "GET", "/http://b/", ""},
      {"OPTIONS * HTTP/1.1", "OPTIONS", "*", ""},
      // RFC 9112, section 3.2.2: absolute-form, with any scheme
      {"GET http://example.org/a HTTP/1.1", "GET", "/a", "example.org"},
      {"GET HTTP://Example.ORG:80/a HTTP/1.1", "GET", "/a", "Example.ORG:80"},
      {"GET https://[::1]:3000/a HTTP/1.1", "GET", "/a", "[::1]:3000"},
      {"GET ws://host/path HTTP/1.1", "GET", "/path", "host"},
      {"GET coap+tcp://host/ HTTP/1.1", "GET", "/", "host"},
      {"GET http://example.org HTTP/1.1", "GET", "/", "example.org"},
      {"GET http://example.org?q=/ HTTP/1.1", "GET", "/?q=/", "example.org"},
      {"GET http://a?b HTTP/1.1", "GET", "/?b", "a"},
      {"OPTIONS http://example.org HTTP/1.1", "OPTIONS", "*", "example.org"},
      {"OPTIONS http://a/ HTTP/1.1", "OPTIONS", "/", "a"},
  };
  for (const auto &c : cases) {
    CAPTURE(c.line);
    RequestHead head;
    CHECK(!parse_request(head_of(c.line, "Host: test\r\n"), head));
    CHECK(head.method == c.method);
    CHECK(head.request_target == c.target);
    CHECK(head.authority == c.authority);
  }
}

TEST_CASE("request head: what can be read in two ways is refused") {
  const std::string line = "POST / HTTP/1.1";
  const auto with = [&](const std::string &lines) {
    return head_of(line, "Host: test\r\n" + lines + "\r\n");
  };
  const struct {
    std::string text, refusal;
  } cases[] = {
      {"GET / HTTP/1.1\nHost: test\r\n\r\n", "400 bare LF in the head"},
      {"GET / HTTP/1.1\r\nHost: test\n\r\n", "400 bare LF in the head"},
      {"GET\r\n\r\n", "400 malformed request line"},
      {head_of("GET /", ""), "400 malformed request line"},
      {head_of("GET / HTTP/1.1 x", ""), "400 malformed request target"},
      {head_of("GE(T / HTTP/1.1", ""), "400 malformed request line"},
      {head_of("GET /a\tb HTTP/1.1", ""), "400 malformed request target"},
      {head_of("GET /a#b HTTP/1.1", ""), "400 malformed request target"},
      {head_of("GET a/b HTTP/1.1", "Host: a\r\n"),
       "400 malformed request target"},
      {head_of("GET * HTTP/1.1", "Host: a\r\n"),
       "400 malformed request target"},
      {head_of("GET http:///a HTTP/1.1", "Host: a\r\n"),
       "400 malformed request target"},
      {head_of("GET http://u@h/ HTTP/1.1", "Host: a\r\n"),
       "400 malformed request target"},
      {head_of("GET 1a://h/ HTTP/1.1", "Host: a\r\n"),
       "400 malformed request target"},
      {head_of("GET / HTTP/2.0", ""),
       "505 an HTTP version other than 1.0 and 1.1"},
      {head_of("CONNECT a:443 HTTP/1.1", "Host: a\r\n"),
       "501 CONNECT is not supported"},
      {with("X : 1"), "400 malformed header line"},
      {with("X: 1\r\n 2"), "400 malformed header line"},
      {with("X"), "400 malformed header line"},
      {with("X: a\0b"s), "400 control character in a header"},
      {with("X: a\rY: b"), "400 control character in a header"},
      {with("X: \x01"), "400 control character in a header"},
      {head_of(line, ""), "400 no Host line"},
      {with("Host: test"), "400 several Host lines"},
      {head_of(line, "Host: a, b\r\n"), "400 malformed Host"},
      {with("Content-Length: 5\r\nContent-Length: 5"),
       "400 several Transfer-Encoding or Content-Length lines"},
      {with("Content-Length: 5, 5"), "400 malformed Content-Length"},
      {with("Content-Length: +5"), "400 malformed Content-Length"},
      {with("Content-Length: 18446744073709551616"),
       "400 malformed Content-Length"},
      {with("Content-Length: 5\r\nTransfer-Encoding: chunked"),
       "400 several Transfer-Encoding or Content-Length lines"},
      {with("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked"),
       "400 several Transfer-Encoding or Content-Length lines"},
      {with("Transfer-Encoding: chunked, gzip"),
       "400 chunked is not the last transfer coding"},
      {with("Transfer-Encoding: gzip, chunked"),
       "501 a Transfer-Encoding other than chunked"},
      {with("Transfer-Encoding: identity"),
       "501 a Transfer-Encoding other than chunked"},
      {head_of("POST / HTTP/1.0", "Transfer-Encoding: chunked\r\n"),
       "400 Transfer-Encoding in HTTP/1.0"},
  };
  for (const auto &c : cases) {
    CAPTURE(c.text);
    CHECK(refusal_of(c.text) == c.refusal);
  }
}

TEST_CASE("request head: control characters, wherever they are") {
  for (std::size_t position = 0; position < 20; ++position) {
    for (int byte = 0; byte < 256; ++byte) {
      if (byte == '\n') { continue; } // it ends the line
      CAPTURE(position);
      CAPTURE(byte);
      std::string value(20, 'a');
      value[position] = static_cast<char>(byte);
      const bool is_control = (byte < ' ' && byte != '\t') || byte == 0x7f;
      CHECK(refusal_of(head_of("GET / HTTP/1.1",
                               "Host: test\r\nX: " + value + "\r\n")) ==
            (is_control ? "400 control character in a header" : ""));
    }
  }
}

TEST_CASE("request head: too many lines or connection options") {
  const std::string start = "GET / HTTP/1.1\r\nHost: test\r\n";
  const auto repeated = [](const std::string &text, int n) {
    std::string all;
    for (int i = 0; i < n; ++i) {
      all += text;
    }
    return all;
  };
  CHECK(refusal_of(start + repeated("a:\r\n", 999) + "\r\n") == "");
  CHECK(refusal_of(start + repeated("a:\r\n", 1000) + "\r\n") ==
        "431 too many header lines");
  CHECK(refusal_of(start + "Connection: " + repeated("a,", 100) + "\r\n\r\n") ==
        "");
  CHECK(refusal_of(start + "Connection: " + repeated("a,", 101) + "\r\n\r\n") ==
        "431 too many connection options");
}

TEST_CASE("request head: nothing of a refused head shapes the response") {
  RequestHead head;
  CHECK(parse_request("HEAD / HTTP/1.1\r\nHost: a\r\nSec-Fetch-Dest: "
                      "document\r\nX: \x01\r\n\r\n",
                      head));
  CHECK(head.method == "HEAD");
  CHECK(head.fields.empty());
  CHECK(!head.keep_alive);
  CHECK(head.framing.done());
}

TEST_CASE("request head: framing and keep-alive") {
  const struct {
    const char *version, *lines, *framing;
    bool keep_alive;
  } cases[] = {
      {"1.1", "", "none", true},
      {"1.1", "Connection: close\r\n", "none", false},
      {"1.1", "Connection: x, Close\r\n", "none", false},
      {"1.1", "Content-Length: 0\r\n", "length", true},
      {"1.1", "Content-Length: 5\r\n", "length", true},
      {"1.1", "Transfer-Encoding: Chunked\r\n", "chunked", true},
      {"1.0", "", "none", false},
      {"1.0", "Connection: Keep-Alive\r\n", "none", true},
      {"1.0", "Connection: keep-alive\r\nConnection: close\r\n", "none", false},
  };
  for (const auto &c : cases) {
    CAPTURE(c.lines);
    RequestHead head;
    CHECK(!parse_request(
        head_of("POST / HTTP/"s + c.version, "Host: test\r\n"s + c.lines),
        head));
    CHECK(name_of(head.framing.mode()) == std::string(c.framing));
    CHECK(head.keep_alive == c.keep_alive);
  }
}

TEST_CASE("request head: bytes that can never become a request") {
  const struct {
    std::string bytes;
    int status; // 0: it is not refused yet
  } cases[] = {
      // Part of a request, or what may stand before it
      {"", 0},
      {"\r", 0},
      {"G", 0},
      {"GET", 0},
      {"GET ", 0},
      {"GET /\xFF", 0},
      {"GET / HTTP/1.1", 0},
      {"GET / HTTP/1.1\r", 0},
      {"GET / HTTP/1.1\r\n", 0},
      {"GET / HTTP/1.1\r\nHost: a\r\n", 0},
      {"GET / HTTP/1.1\r\nHost: a\r\nX\x01", 0}, // its line is not complete
      // Something else
      {"\x16\x03\x01\x02"s, 400}, // TLS
      {"\x16", 400},
      {"\0"s, 400},
      {"\n", 400},
      {" ", 400},
      {"\rG", 400},
      {"GET / HTTP/1.1\n", 400},
      {"GET / HTTP/1.1\rH", 400},
      {"GET\t", 400},
      {"G\xC9T", 400},
      {"GET /\x01", 400},
      {"GET / HTTP/1.1 x", 400},
      {"SSH-2.0-OpenSSH_9.2\r\n", 400},
      {"EHLO example.org\r\n", 400},
      {"get foo bar\r\n", 400},
      {"GET foo HTTP/1.1\r\n", 400},
      {"GET / HTTP/3.0\r\n", 505},
      {"PRI * HTTP/2.0\r\n", 505},
      {"OPTIONS * RTSP/1.0\r\n", 400},
      {"CONNECT a:443 HTTP/1.1\r\n", 501},
      // Behind the first line
      {"GET / HTTP/1.1\r\nHost : a\r\n", 400},
      {"GET / HTTP/1.1\r\nHost: a\x01\r\n", 400},
      {"GET / HTTP/1.1\r\nHost: a\n", 400},
      {"GET / HTTP/1.1\r\nHost: a\r\n folded\r\n", 400},
  };
  for (const auto &c : cases) {
    CAPTURE(c.bytes);
    const auto refusal = early_refusal(c.bytes);
    CHECK(refusal.status == c.status);
    // The same if it arrives byte by byte.
    Refusal early;
    for (std::size_t n = 1; n <= c.bytes.size() && !early; ++n) {
      early = early_refusal(c.bytes.substr(0, n), n - 1);
    }
    CHECK(early.status == c.status);
  }
  CHECK(early_refusal("\x16\x03\x01").reason ==
        "a TLS handshake on a port for plain HTTP"s);
}

// ---- Responses

TEST_CASE("response head: as the target sent it") {
  for (const std::string lines :
       {"", "A:1\r\nb:  2 \t\r\nC:\r\nA: 3\r\n", "X: \xE9\xFF \t x\r\n",
        "X: \x01\x1b[2J\x7f\r\n"}) { // RFC 9110, section 5.5
    CAPTURE(lines);
    ResponseHead head;
    CHECK(!parse_response(head_of("HTTP/1.1 200 OK", lines), "GET", head));
    CHECK(lines_of(head) == lines);
    CHECK(head.status_and_reason == "200 OK");
    CHECK(!head.must_close);
    CHECK(head.repairs.empty());
  }
}

TEST_CASE("response head: what is repaired, or left out") {
  const struct {
    std::string sent, read, framing;
  } cases[] = {
      {"Name : value\r\n", "Name: value\r\n", "until close"},
      {"Name \t : value\r\n", "Name: value\r\n", "until close"},
      {"Content-Length : 2\r\n", "Content-Length: 2\r\n", "length"},
      {"Transfer-Encoding : chunked\r\n", "Transfer-Encoding: chunked\r\n",
       "chunked"},
      // Folded lines (RFC 9112, section 5.2)
      {"A: 1\r\n 2\r\nB: 3\r\n", "A: 1 2\r\nB: 3\r\n", "until close"},
      {"A: 1  \r\n\t  2\r\n 3\r\n", "A: 1 2 3\r\n", "until close"},
      {"A:\r\n 1\r\n", "A: 1\r\n", "until close"},
      {"A: 1\r\n  \r\nB: 2\r\n", "A: 1\r\nB: 2\r\n", "until close"},
      {"A : 1\r\n 2\r\n", "A: 1 2\r\n", "until close"},
      {"A: 1\n 2\n", "A: 1 2\r\n", "until close"},
      // Lines whose name is no token
      {"A: 1\r\nno colon\r\nB: 2\r\n", "A: 1\r\nB: 2\r\n", "until close"},
      {": 1\r\nB: 2\r\n", "B: 2\r\n", "until close"},
      {"  : 1\r\nB: 2\r\n", "B: 2\r\n", "until close"},
      {"X Y: 1\r\nB: 2\r\n", "B: 2\r\n", "until close"},
      {"X Y: 1\r\n folded\r\nB: 2\r\n", "B: 2\r\n", "until close"},
      {"X(Y) : 1\r\nB: 2\r\n", "B: 2\r\n", "until close"},
      {" A: 1\r\nB: 2\r\n", "B: 2\r\n", "until close"}, // section 2.2
      // Transfer-Encoding
      {"Transfer-Encoding: chunked\r\nA: 1\r\ntransfer-encoding: chunked\r\n",
       "Transfer-Encoding: chunked\r\nA: 1\r\n", "chunked"},
      {"Transfer-Encoding: chunked, Chunked\r\n",
       "Transfer-Encoding: chunked\r\n", "chunked"},
      {"Transfer-Encoding: identity, chunked\r\n",
       "Transfer-Encoding: chunked\r\n", "chunked"},
      {"Transfer-Encoding: identity\r\nContent-Length: 2\r\n",
       "Content-Length: 2\r\n", "length"},
      {"Transfer-Encoding: identity\r\n", "", "until close"},
      {"Transfer-Encoding:\r\n", "", "until close"},
      {"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n",
       "Transfer-Encoding: chunked\r\n", "chunked"},
      // Content-Length
      {"Content-Length: 2, 2\r\n", "Content-Length: 2\r\n", "length"},
      {"Content-Length: 2\r\nA: 1\r\ncontent-length: 2\r\n",
       "Content-Length: 2\r\nA: 1\r\n", "length"},
      {"Content-Length: 2 ,\r\n", "Content-Length: 2\r\n", "length"},
      {"Content-Length: 2, 02\r\nContent-Length: 2\r\n",
       "Content-Length: 2\r\n", "length"},
  };
  for (const auto &c : cases) {
    CAPTURE(c.sent);
    ResponseHead head;
    const auto refusal =
        parse_response(head_of("HTTP/1.1 200 OK", c.sent), "GET", head);
    CHECK(refusal.status == 0);
    CHECK(lines_of(head) == c.read);
    CHECK(name_of(head.framing.mode()) == c.framing);
    CHECK(head.must_close);
    CHECK(head.repairs.size() > 0);
  }
}

TEST_CASE("response head: repairs are named for the log") {
  const struct {
    const char *lines, *repair;
  } cases[] = {
      {"X-A : 1\r\n", "header line repaired: X-A"},
      {"X-A: 1\r\n 2\r\n", "header line repaired: X-A"},
      {"X Y: \x1b\r\n",
       "header line left out, since its name is no token: X Y: ?"},
      {"Transfer-Encoding: identity\r\n",
       "Transfer-Encoding or Content-Length merged"},
      {"Transfer-Encoding: chunked, chunked\r\n",
       "Transfer-Encoding or Content-Length merged"},
      {"Content-Length: 2, 2\r\n",
       "Transfer-Encoding or Content-Length merged"},
      {"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n",
       "Transfer-Encoding or Content-Length merged"},
  };
  for (const auto &c : cases) {
    ResponseHead head;
    CHECK(!parse_response(head_of("HTTP/1.1 200 OK", c.lines), "GET", head));
    REQUIRE(head.repairs.size() == 1);
    CHECK(head.repairs[0] == c.repair);
  }
}

TEST_CASE("response head: an empty line before the status line") {
  ResponseHead head;
  const auto text = "\r\nHTTP/1.1 200 OK\r\nA: 1\r\n\r\n"s;
  CHECK(head_end(text) == text.size());
  CHECK(!parse_response(text, "GET", head));
  CHECK(head.status == 200);
  CHECK(lines_of(head) == "A: 1\r\n");
  CHECK(head.must_close);
}

TEST_CASE("response head: what is refused") {
  const struct {
    std::string text;
    const char *reason;
  } cases[] = {
      {"HTTP/1.1\r\n\r\n", "malformed status line"},
      {"HTTP/2.0 200 OK\r\n\r\n", "malformed status line"},
      {"HTTP/1.1 20 OK\r\n\r\n", "malformed status line"},
      {"HTTP/1.1 099 OK\r\n\r\n", "malformed status line"},
      {"HTTP/1.1 2000 OK\r\n\r\n", "malformed status line"},
      {"HTTP/1.1 200 O\rK\r\n\r\n", "malformed status line"},
      {"SSH-2.0-OpenSSH_9.2\r\n\r\n", "malformed status line"},
      {"HTTP/1.1 200 OK\r\nX: a\0b\r\n\r\n"s, "control character in a header"},
      {"HTTP/1.1 200 OK\r\nX: a\rY: b\r\n\r\n",
       "control character in a header"},
      {"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
       "malformed Content-Length"},
      {"HTTP/1.1 200 OK\r\nContent-Length:\r\n\r\n",
       "malformed Content-Length"},
      {"HTTP/1.1 200 OK\r\nContent-Length: 2, 3\r\n\r\n",
       "several Content-Lengths that differ"},
      {"HTTP/1.1 200 OK\r\nContent-Length:\r\nContent-Length: 6\r\n\r\n",
       "malformed Content-Length"},
      {"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n",
       "several Content-Lengths that differ"},
      {"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
       "a Transfer-Encoding other than chunked"},
      {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked, gzip\r\n\r\n",
       "a Transfer-Encoding other than chunked"},
      {"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
       "Transfer-Encoding in HTTP/1.0"},
  };
  for (const auto &c : cases) {
    CAPTURE(c.text);
    ResponseHead head;
    const auto refusal = parse_response(c.text, "GET", head);
    CHECK(refusal.status == 502);
    CHECK(refusal.reason == std::string(c.reason));
  }
}

// After these, the target may send a body that is nobody's.
TEST_CASE("response head: a body where none may be") {
  const struct {
    const char *status, *lines, *read;
    bool must_close;
  } cases[] = {
      {"204 No Content", "A: 1\r\n", "A: 1\r\n", false},
      {"204 No Content", "Content-Length: 0\r\n", "", false},
      {"204 No Content", "Content-Length: 5\r\n", "", true},
      {"204 No Content", "Transfer-Encoding: chunked\r\n", "", true},
      {"304 Not Modified", "Content-Length: 5\r\n", "Content-Length: 5\r\n",
       true},
      {"304 Not Modified", "Transfer-Encoding: chunked\r\n",
       "Transfer-Encoding: chunked\r\n", true},
      {"304 Not Modified", "", "", false},
      {"100 Continue", "Content-Length: 5\r\n", "", true},
      {"101 Switching", "Upgrade: x\r\n", "Upgrade: x\r\n", false},
  };
  for (const auto &c : cases) {
    CAPTURE(c.status);
    CAPTURE(c.lines);
    ResponseHead head;
    CHECK(!parse_response(head_of("HTTP/1.1 "s + c.status, c.lines), "GET",
                          head));
    CHECK(lines_of(head) == c.read);
    CHECK(head.framing.done());
    CHECK(head.must_close == c.must_close);
  }
}

TEST_CASE("response head: HEAD keeps the lines and has no body") {
  for (const std::string lines :
       {"Content-Length: 5\r\n", "Transfer-Encoding: chunked\r\n", ""}) {
    ResponseHead head;
    CHECK(!parse_response(head_of("HTTP/1.1 200 OK", lines), "HEAD", head));
    CHECK(lines_of(head) == lines);
    CHECK(head.framing.done());
    CHECK(!head.must_close);
  }
}

TEST_CASE("response head: hop-by-hop fields end here") {
  const struct {
    const char *sent, *arrives;
  } cases[] = {
      {"A: 1\r\nConnection: keep-alive\r\nKeep-Alive: timeout=5\r\nB: 2\r\n",
       "A: 1\r\nB: 2\r\n"},
      {"X: 1\r\nConnection: x, Y\r\nA: 1\r\ny: 2\r\n", "A: 1\r\n"},
      {"Connection: Location\r\nLocation: http://localhost:8080/\r\n", ""},
      {"Upgrade: h2c\r\nConnection: Upgrade\r\nA: 1\r\n", "A: 1\r\n"},
      {"Connection: Content-Length\r\n", ""},
  };
  for (const auto &c : cases) {
    CAPTURE(c.sent);
    CHECK(answered(any_request, head_of("HTTP/1.1 200 OK",
                                        c.sent + "Content-Length: 2\r\n"s)) ==
          head_of("HTTP/1.1 200 OK", c.arrives + "Content-Length: 2\r\n"s));
  }
}

TEST_CASE("response head: Connection as the client has to know it") {
  const auto head = [](const std::string &request, const std::string &response,
                       bool keep_alive) {
    RequestHead asked;
    REQUIRE(!parse_request(request, asked));
    ResponseHead answer;
    REQUIRE(!parse_response(response, asked.method, answer));
    std::string out;
    const Situation setting;
    HeadWriter(asked, setting.forwarding(), out)
        .write_response(answer, keep_alive, "Server-Timing: x\r\n");
    return out;
  };
  const auto old = "GET / HTTP/1.0\r\nHost: test\r\n\r\n"s;
  CHECK(head(any_request, "HTTP/1.1 200 OK\r\n\r\n", true) ==
        "HTTP/1.1 200 OK\r\nServer-Timing: x\r\n\r\n");
  CHECK(head(any_request, "HTTP/1.0 200 OK\r\n\r\n", false) ==
        "HTTP/1.1 200 OK\r\nServer-Timing: x\r\nConnection: close\r\n\r\n");
  CHECK(head(old, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
             false) ==
        "HTTP/1.1 200 OK\r\nServer-Timing: x\r\nConnection: close\r\n\r\n");
  CHECK(head(old, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n", true) ==
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nServer-Timing: x\r\n"
        "Connection: keep-alive\r\n\r\n");
  CHECK(head(any_request, "HTTP/1.1 103 Hints\r\nLink: x\r\n\r\n", true) ==
        "HTTP/1.1 103 Hints\r\nLink: x\r\n\r\n");
  CHECK(head(any_request, "HTTP/1.1 101 Go\r\nUpgrade: x\r\n\r\n", false) ==
        "HTTP/1.1 101 Go\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n");
  CHECK(head(any_request, "HTTP/1.1 426 No\r\nUpgrade: x\r\n\r\n", false) ==
        "HTTP/1.1 426 No\r\nUpgrade: x\r\nServer-Timing: x\r\n"
        "Connection: close, Upgrade\r\n\r\n");
}

// ---- Framing

namespace {

struct Body {
  std::string taken, content;
  bool done = false, malformed = false;
};

// What is sent on of a body that comes in portions of this size.
Body take_all(Framing framing, const std::string &bytes, std::size_t portion) {
  Body body;
  auto copy = framing;
  body.content.clear();
  for (std::size_t at = 0; at < bytes.size(); at += portion) {
    copy.take(bytes.substr(at, portion), &body.content);
  }
  std::string buffer;
  for (std::size_t at = 0; at < bytes.size() && !framing.done();
       at += portion) {
    buffer += bytes.substr(at, portion);
    for (;;) {
      const auto n = framing.take(buffer);
      body.taken += buffer.substr(0, n);
      buffer.erase(0, n);
      if (!framing.at_superfluous_blank()) { break; }
      buffer.erase(0, 1);
    }
    if (framing.malformed()) { break; }
  }
  body.done = framing.done();
  body.malformed = framing.malformed();
  CHECK(copy.done() == framing.done());
  CHECK(copy.malformed() == framing.malformed());
  CHECK(copy.corrected() == framing.corrected());
  return body;
}

} // namespace

TEST_CASE("framing: chunks of a request, strictly") {
  const struct {
    std::string bytes, content;
    char outcome; // d: done, m: malformed, '.': more to come
  } cases[] = {
      {"0\r\n\r\n", "", 'd'},
      {"2\r\nok\r\n0\r\n\r\n", "ok", 'd'},
      {"A;x=\"y\"\r\n0123456789\r\n00\r\nT: 1\r\n\r\n", "0123456789", 'd'},
      {"2\r\nok", "ok", '.'},
      {"2\r\nok\r\n0\r\nT:", "ok", '.'},
      {"2 \r\nok", "", 'm'},
      {" 2\r\nok", "", 'm'},
      {"2\nok", "", 'm'},
      {"2\r\nokk", "ok", 'm'},
      {"g", "", 'm'},
      {"\r\n", "", 'm'},
      {"8000000000000000\r\n", "", 'm'},
      {"0\r\nT : 1\r\n\r\n", "", 'm'},
      {"0\r\nT: \x01\r\n\r\n", "", 'm'},
      {"0\r\n\n", "", 'm'},
  };
  for (const auto &c : cases) {
    for (const std::size_t portion : {1u, 2u, 3u, 100u}) {
      CAPTURE(c.bytes);
      CAPTURE(portion);
      const auto body =
          take_all(Framing(Framing::Mode::chunked), c.bytes, portion);
      CHECK(body.content == c.content);
      CHECK(body.done == (c.outcome == 'd'));
      CHECK(body.malformed == (c.outcome == 'm'));
      if (body.done) { CHECK(body.taken == c.bytes); }
    }
  }
}

TEST_CASE("framing: chunks of a response go out without superfluous blanks") {
  const struct {
    std::string sent, goes_out;
    bool malformed = false;
  } cases[] = {
      {"2  \r\nok\r\n0\r\n\r\n", "2\r\nok\r\n0\r\n\r\n"},
      {" \t2\t\r\nok\r\n 0 \r\n\r\n", "2\r\nok\r\n0\r\n\r\n"},
      {"2 ;x=y\r\nok\r\n0\r\n\r\n", "2;x=y\r\nok\r\n0\r\n\r\n"},
      {"2; x=y\r\nok\r\n0\r\n\r\n", "2; x=y\r\nok\r\n0\r\n\r\n"},
      {"2\r\n  \r\n0\r\n\r\n", "2\r\n  \r\n0\r\n\r\n"}, // the content
      {"0\r\nT : 1\r\n\r\n", "0\r\nT: 1\r\n\r\n"},
      {"0\r\nT: \x01\r\n\r\n", "0\r\nT: \x01\r\n\r\n"},
      {"2 2\r\n", "2", true},
      {"2 \n", "2", true},
      {"0\r\nT x: 1\r\n\r\n", "0\r\nT", true},
      {"0\r\n T: 1\r\n\r\n", "0\r\n", true},
      {"0\r\nT: a\0b\r\n\r\n"s, "0\r\nT: a", true},
      {"2\r\nok \r\n", "2\r\nok", true},
  };
  for (const auto &c : cases) {
    for (const std::size_t portion : {1u, 2u, 3u, 100u}) {
      CAPTURE(c.sent);
      CAPTURE(portion);
      const auto body = take_all(Framing::forgiving_chunked(), c.sent, portion);
      CHECK(body.taken == c.goes_out);
      CHECK(body.malformed == c.malformed);
      CHECK(body.done == !c.malformed);
    }
  }
}

TEST_CASE("framing: a size line without end") {
  Framing framing = Framing::forgiving_chunked();
  std::string content;
  framing.take("2" + std::string(70000, ' ') + "\r\nok", &content);
  CHECK(framing.malformed());
  framing = Framing(Framing::Mode::chunked);
  framing.take(std::string(70000, '0'));
  CHECK(framing.malformed());
}

TEST_CASE("framing: length, until close, none") {
  Framing length(Framing::Mode::length, 3);
  CHECK(length.take("ab") == 2);
  CHECK(!length.done());
  CHECK(length.take("cd") == 1);
  CHECK(length.done());
  CHECK(length.take("d") == 0);
  CHECK(Framing(Framing::Mode::length, 0).done());
  Framing rest(Framing::Mode::until_close);
  CHECK(rest.take("abc") == 3);
  CHECK(!rest.done());
  rest.close();
  CHECK(rest.done());
  CHECK(rest.take("d") == 0);
  CHECK(Framing().done());
}

// ---- Forwarding

TEST_CASE("forwarding: header lines arrive as they were sent") {
  for (const std::string lines :
       {"x-b: 1\r\nX-A: 2\r\nx-C: 3\r\naCCEPT: 4\r\n",
        "Cookie: a=1\r\nCookie: b=2\r\ncookie: a=1\r\n",
        "X:1\r\nY:   2 \t \r\nZ:\t3\r\n", "X:\r\nY: \r\n",
        "Content_Length: 5\r\n_: 2\r\n", "Expect: 100-continue\r\n",
        "Authorization: Basic YTpi\r\n", "Via: 1.1 x\r\n",
        "x-vercel-id: 3\r\nx-vercel-internal: 4\r\n"}) {
    CHECK(forwarded_lines(lines) == lines + ours);
  }
}

TEST_CASE("forwarding: hop-by-hop fields end here") {
  const struct {
    const char *sent, *arrives;
  } cases[] = {
      {"A: 1\r\nConnection: close\r\nB: 2\r\n", "A: 1\r\nB: 2\r\n"},
      {"Connection: keep-alive\r\nKeep-Alive: 300\r\n", ""},
      {"Proxy-Connection: keep-alive\r\nA: 1\r\n", "A: 1\r\n"},
      {"X-Hop: 1\r\nConnection: x-hop\r\nX-HOP: 2\r\nX: 3\r\n", "X: 3\r\n"},
      {"Upgrade: websocket\r\nA: 1\r\n", "A: 1\r\n"},
      {"Connection: Host\r\nA: 1\r\n", "A: 1\r\n"},
      {"TE: gzip\r\nConnection: TE\r\n", ""},
      {"Warmproxy-Wait: 1\r\n", ""},
  };
  for (const auto &c : cases) {
    CAPTURE(c.sent);
    CHECK(forwarded_lines(c.sent) == c.arrives + ours);
  }
  CHECK(forwarded_lines("TE: gzip, trailers\r\nConnection: TE\r\n") ==
        ours + "TE: trailers\r\nConnection: TE\r\n");
}

TEST_CASE("forwarding: upgrades, but to HTTP/2 and TLS") {
  const std::string connection = "Connection: Upgrade\r\n";
  const struct {
    const char *sent, *arrives;
    bool upgrade;
  } cases[] = {
      {"Upgrade: websocket\r\n", "Upgrade: websocket\r\n", true},
      {"Upgrade: a/1, b\r\n", "Upgrade: a/1, b\r\n", true},
      {"Upgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n", "", false},
      {"Upgrade: H2C\r\n", "", false},
      {"Upgrade: TLS/1.2\r\n", "", false},
      {"Upgrade: h2c, websocket, tls/1.0\r\nHTTP2-Settings: x\r\n",
       "Upgrade: websocket\r\n", true},
      {"Upgrade: h2c\r\nUpgrade: websocket\r\n", "Upgrade: websocket\r\n",
       true},
      {"Upgrade: h2cx\r\n", "Upgrade: h2cx\r\n", true},
  };
  for (const auto &c : cases) {
    CAPTURE(c.sent);
    CHECK(forwarded_lines(connection + c.sent) ==
          ours + c.arrives + (c.upgrade ? connection : ""));
    RequestHead head;
    CHECK(!parse_request(
        head_of("GET / HTTP/1.1", "Host: a\r\n" + connection + c.sent), head));
    CHECK(head.upgrades() == c.upgrade);
  }
}

TEST_CASE("forwarding: the framing is said in one way") {
  CHECK(forwarded(head_of("POST / HTTP/1.1",
                          "Host: test\r\ncontent-length:005\r\n")) ==
        "POST / HTTP/1.1\r\nHost: test\r\ncontent-length: 5\r\n" + ours +
            "\r\n");
  CHECK(forwarded(head_of("POST / HTTP/1.1",
                          "Host: test\r\nTRANSFER-ENCODING:CHUNKED\r\n"
                          "Connection: transfer-encoding\r\n")) ==
        "POST / HTTP/1.1\r\nHost: test\r\nTRANSFER-ENCODING: chunked\r\n" +
            ours + "\r\n");
}

// RFC 9110, section 2.5: an intermediary sends its own version.
TEST_CASE("forwarding: HTTP/1.0 requests go on as HTTP/1.1") {
  const std::string end = "X-Forwarded-For: 192.0.2.7\r\n"
                          "X-Forwarded-Proto: http\r\n";
  CHECK(forwarded("GET /a HTTP/1.0\r\nA: 1\r\n\r\n") ==
        "GET /a HTTP/1.1\r\nHost: 127.0.0.1:8080\r\nA: 1\r\n" + end + "\r\n");
  CHECK(forwarded("GET http://example.org/a HTTP/1.0\r\n\r\n") ==
        "GET /a HTTP/1.1\r\nHost: example.org\r\n" + end +
            "X-Forwarded-Host: example.org\r\n\r\n");
  CHECK(forwarded("GET / HTTP/1.0\r\nHost: test\r\nConnection: keep-alive, "
                  "TE\r\nTE: trailers\r\nExpect: 100-continue\r\n\r\n") ==
        "GET / HTTP/1.1\r\nHost: test\r\n" + ours + "\r\n");
}

TEST_CASE("forwarding: the host") {
  const auto head = forwarded(
      "GET http://Example.ORG:80/ HTTP/1.1\r\nHost: x\r\nA: 1\r\n\r\n");
  CHECK(head == "GET / HTTP/1.1\r\nHost: Example.ORG:80\r\nA: 1\r\n"
                "X-Forwarded-For: 192.0.2.7\r\nX-Forwarded-Proto: http\r\n"
                "X-Forwarded-Host: Example.ORG:80\r\n\r\n");
  CHECK(forwarded("GET / HTTP/1.1\r\nhOST:a\r\n\r\n")
            .find("GET / HTTP/1.1\r\nhOST:a\r\n") == 0);
  // Vercel sends the deployment's host, and the visitor's beside it.
  CHECK(forwarded("GET / HTTP/1.1\r\nA: 1\r\nHost: x.vercel.app\r\n"
                  "X-Forwarded-Host: example.org\r\n\r\n",
                  on_vercel()) ==
        "GET / HTTP/1.1\r\nHost: example.org\r\nA: 1\r\n"
        "X-Forwarded-Host: example.org\r\nX-Forwarded-For: 192.0.2.7\r\n"
        "X-Forwarded-Proto: http\r\n\r\n");
}

TEST_CASE("forwarding: nobody is believed") {
  for (const std::string line :
       {"X-Forwarded-For: 10.0.0.1",
        "x-forwarded-for:",
        "X-Forwarded-Proto: a",
        "X-FORWARDED-HOST: a",
        "X-Forwarded-Port: 1",
        "X-Forwarded-Prefix: /a",
        "X-Forwarded-Scheme: a",
        "X-Forwarded-Ssl: on",
        "X-Forwarded-: 1",
        "Forwarded: for=1.2.3.4;proto=https",
        "X-Real-IP: 1.2.3.4",
        "X_Forwarded_Proto: https",
        "X-Forwarded_Host: a",
        "X_REAL-IP: 1",
        "Proxy: http://evil/",
        "x-vercel-internal-x: 1",
        "x-vercel-sc-host: a",
        "X_Vercel_SC_Host: a",
        "X-Forwarded-For: a\r\nX-Forwarded-For: b",
        "X-Forwarded-For: a\r\nConnection: X-Forwarded-For"}) {
    CAPTURE(line);
    CHECK(forwarded_lines(line + "\r\n") == ours);
  }
}

TEST_CASE("forwarding: whoever connects is believed") {
  const struct {
    const char *sent, *arrives;
  } cases[] = {
      {"", "X-Forwarded-For: 192.0.2.7\r\nX-Forwarded-Proto: http\r\n"
           "X-Forwarded-Host: test\r\n"},
      {"X-Forwarded-For: 10.0.0.1\r\nX-Forwarded-Proto: https\r\n"
       "X-Forwarded-Host: example.org\r\n",
       "X-Forwarded-Proto: https\r\nX-Forwarded-Host: example.org\r\n"
       "X-Forwarded-For: 10.0.0.1, 192.0.2.7\r\n"},
      {"x-forwarded-for: 10.0.0.1\r\nA: 1\r\nX-FORWARDED-FOR:10.0.0.2\r\n",
       "A: 1\r\nX-Forwarded-For: 10.0.0.1, 10.0.0.2, 192.0.2.7\r\n"
       "X-Forwarded-Proto: http\r\nX-Forwarded-Host: test\r\n"},
      {"X-Forwarded-For:\r\n",
       "X-Forwarded-For: 192.0.2.7\r\nX-Forwarded-Proto: http\r\n"
       "X-Forwarded-Host: test\r\n"},
      {"Forwarded: for=10.0.0.1;proto=https\r\nX-Real-IP: 10.0.0.1\r\n"
       "X-Forwarded-Port: 443\r\n",
       "Forwarded: for=10.0.0.1;proto=https\r\nX-Real-IP: 10.0.0.1\r\n"
       "X-Forwarded-Port: 443\r\nX-Forwarded-For: 192.0.2.7\r\n"
       "X-Forwarded-Host: test\r\n"},
      {"X_Forwarded_Proto: https\r\nX_Real_IP: 1\r\nProxy: x\r\n"
       "X-Vercel-SC-A: 1\r\n",
       "X-Forwarded-For: 192.0.2.7\r\nX-Forwarded-Proto: http\r\n"
       "X-Forwarded-Host: test\r\n"},
  };
  for (const auto &c : cases) {
    CAPTURE(c.sent);
    CHECK(forwarded_lines(c.sent, trusting()) == c.arrives);
  }
  const std::string chain = "X-Forwarded-For: 10.0.0.1\r\n"
                            "x-forwarded-for: 10.0.0.2\r\n"
                            "X-Forwarded-Proto: https\r\n"
                            "X-Forwarded-Host: test\r\n";
  CHECK(forwarded_lines(chain, on_vercel()) == chain);
}

TEST_CASE("forwarding: a front that speaks of https and is not believed") {
  RequestHead head;
  CHECK(!parse_request("GET / HTTP/1.1\r\nHost: a\r\nX-Forwarded-Proto: "
                       "HTTPS, http\r\n\r\n",
                       head));
  CHECK(ignores_forwarded_https(head, Situation().config));
  CHECK(!ignores_forwarded_https(head, trusting().config));
  CHECK(!ignores_forwarded_https(head, on_vercel().config));
}

TEST_CASE("forwarding: the prefix is removed on a segment boundary") {
  const struct {
    const char *sent, *arrives;
    bool stripped;
  } cases[] = {
      {"/app", "/", true},
      {"/app/", "/", true},
      {"/app?x=/app/", "/?x=/app/", true},
      {"/app//x", "//x", true},
      {"/app/app/x", "/app/x", true},
      {"http://test/app/x", "/x", true},
      {"/apple", "/apple", false},
      {"/app%2Fx", "/app%2Fx", false},
      {"//app/x", "//app/x", false},
      {"/x?/app", "/x?/app", false},
      {"http://test", "/", false},
  };
  for (const auto &c : cases) {
    CAPTURE(c.sent);
    CHECK(forwarded(head_of("GET "s + c.sent + " HTTP/1.1", "Host: test\r\n"),
                    stripping()) ==
          "GET "s + c.arrives + " HTTP/1.1\r\nHost: test\r\n" + ours +
              (c.stripped ? "X-Forwarded-Prefix: /app\r\n" : "") + "\r\n");
  }
  CHECK(forwarded(head_of("GET /app/x HTTP/1.1",
                          "Host: test\r\nX-Forwarded-Prefix: /outer\r\n"),
                  stripping(trusting())) ==
        "GET /x HTTP/1.1\r\nHost: test\r\n" + ours +
            "X-Forwarded-Prefix: /outer, /app\r\n\r\n");
}

// RFC 4918, section 10.3.
TEST_CASE("forwarding: WebDAV's Destination loses the prefix, too") {
  const struct {
    const char *target, *sent, *arrives;
  } cases[] = {
      {"/app/a", "http://test/app/b", "http://test/b"},
      {"/app/a", "HTTPS://TEST/app/b", "HTTPS://TEST/b"},
      {"/app/a", "/app/b", "/b"},
      {"/app/a", "/app", "/"},
      {"/app/a", "http://test/app", "http://test/"},
      {"/app/a", "http://test/apple", "http://test/apple"},
      {"/app/a", "http://test.example/app/b", "http://test.example/app/b"},
      {"/app/a", "//test/app/b", "//test/app/b"},
      {"/app/a", "nonsense", "nonsense"},
      {"/a", "http://test/app/b", "http://test/app/b"},
  };
  for (const auto &c : cases) {
    CAPTURE(c.sent);
    const auto head =
        forwarded(head_of("MOVE "s + c.target + " HTTP/1.1",
                          "Host: test\r\nDestination: "s + c.sent + "\r\n"),
                  stripping());
    CHECK(contains(head, "\r\nDestination: "s + c.arrives + "\r\n"));
  }
}

TEST_CASE("forwarding: own routes see the client's request") {
  const auto own = [](const std::string &text, const Situation &setting) {
    RequestHead head;
    REQUIRE(!parse_request(text, head));
    std::string out;
    HeadWriter(head, {setting.config, setting.client, {}}, out)
        .write_own_request();
    return out;
  };
  const std::string text =
      "POST /app/x HTTP/1.1\r\nA: 1\r\nHost: test\r\nConnection: close, A\r\n"
      "Upgrade: x\r\nX-Forwarded-For: 1\r\nExpect: 100-continue\r\n"
      "Content-Length: 5\r\n\r\n";
  CHECK(own(text, stripping()) ==
        "POST /app/x HTTP/1.1\r\nHost: test\r\nExpect: 100-continue\r\n"
        "Content-Length: 5\r\n\r\n");
  CHECK(own(text, trusting()) ==
        "POST /app/x HTTP/1.1\r\nHost: test\r\nX-Forwarded-For: 1\r\n"
        "Expect: 100-continue\r\nContent-Length: 5\r\n\r\n");
  CHECK(own("GET http://a/x HTTP/1.0\r\n\r\n", {}) ==
        "GET /x HTTP/1.0\r\nHost: a\r\n\r\n");
}

TEST_CASE("forwarding: who logs in a connection") {
  const struct {
    const char *lines;
    bool authenticates;
  } cases[] = {
      {"", false},
      {"Authorization: Basic TlRMTQ==\r\n", false},
      {"Authorization: NTLM TlRMTVNTUAAB\r\n", true},
      {"authorization: negotiate YII=\r\n", true},
      {"WWW-Authenticate: Basic realm=\"a\"\r\nWWW-Authenticate: NTLM\r\n",
       true},
      {"WWW-Authenticate: Basic realm=\"a\", Negotiate\r\n", true},
      {"X: NTLM\r\n", false},
  };
  for (const auto &c : cases) {
    CAPTURE(c.lines);
    ResponseHead head;
    CHECK(!parse_response(head_of("HTTP/1.1 401 No", c.lines), "GET", head));
    CHECK(authenticates_connection(head) == c.authenticates);
  }
}

// ---- Location

namespace {

std::string location_for(const std::string &target, const std::string &lines,
                         const std::string &location, const Situation &setting,
                         const std::string &name = "Location") {
  const auto head = answered(
      head_of("GET " + target + " HTTP/1.1", lines),
      head_of("HTTP/1.1 302 Found", name + ": " + location + "\r\n"), setting);
  const auto start = "HTTP/1.1 302 Found\r\n" + name + ": ";
  REQUIRE(head.substr(0, start.size()) == start);
  return head.substr(start.size(), head.size() - start.size() - 4);
}

} // namespace

TEST_CASE("location: with the target's port") {
  const std::string forwarded_https = "X-Forwarded-Proto: https\r\n"
                                      "X-Forwarded-Host: example.org\r\n";
  const struct {
    const char *sent, *arrives, *arrives_over_https;
  } cases[] = {
      {"http://test:8080/dir/", "http://test:3000/dir/",
       "https://example.org/dir/"},
      {"http://localhost:8080/a?b#c", "http://test:3000/a?b#c",
       "https://example.org/a?b#c"},
      {"http://127.0.0.1:8080", "http://test:3000", "https://example.org"},
      {"http://[::1]:8080/", "http://test:3000/", "https://example.org/"},
      {"HTTP://TEST:8080/", "http://test:3000/", "https://example.org/"},
      {"https://localhost:8080/a", "http://test:3000/a",
       "https://example.org/a"},
      // Our own host
      {"http://test:3000/a", "http://test:3000/a", "https://example.org/a"},
      // Not ours
      {"http://localhost/a", "http://localhost/a", "http://localhost/a"},
      {"http://localhost:80801/a", "http://localhost:80801/a",
       "http://localhost:80801/a"},
      {"http://test.evil:8080/", "http://test.evil:8080/",
       "http://test.evil:8080/"},
      {"http://test/", "http://test/", "http://test/"},
      {"http://evil/?http://localhost:8080/",
       "http://evil/?http://localhost:8080/",
       "http://evil/?http://localhost:8080/"},
      {"//localhost:8080/a", "//localhost:8080/a", "//localhost:8080/a"},
      {"/a", "/a", "/a"},
      {"a", "a", "a"},
      {"?a=http://test:8080/", "?a=http://test:8080/", "?a=http://test:8080/"},
      {"mailto:a@test", "mailto:a@test", "mailto:a@test"},
  };
  for (const auto &c : cases) {
    CAPTURE(c.sent);
    CHECK(location_for("/", "Host: test:3000\r\n", c.sent, {}) == c.arrives);
    CHECK(location_for("/", "Host: test:3000\r\n" + forwarded_https, c.sent,
                       trusting()) == c.arrives_over_https);
    CHECK(location_for("/", "Host: test:3000\r\n", c.sent, {},
                       "Content-Location") == c.arrives);
  }
  // A target that itself leads to https is not led back.
  CHECK(location_for("/", "Host: test\r\n", "https://test/", {}) ==
        "https://test/");
  // The scheme is unknown.
  CHECK(location_for("/", "Host: test\r\nForwarded: proto=https\r\n",
                     "http://test:8080/a", trusting()) == "http://test/a");
  CHECK(location_for("/", "Host: test\r\nForwarded: proto=https\r\n",
                     "https://localhost:8080/a",
                     trusting()) == "https://test/a");
  // The client has named no host.
  const std::string found =
      "HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:8080/a\r\n";
  CHECK(answered("GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
                 found + "\r\n") == found + "Connection: keep-alive\r\n\r\n");
}

TEST_CASE("location: the prefix") {
  const struct {
    const char *sent, *arrives;
  } cases[] = {
      {"/login", "/app/login"},
      {"/", "/app/"},
      {"/?a", "/app/?a"},
      {"/app", "/app"},
      {"/app/login", "/app/login"},
      {"/app?a", "/app?a"},
      {"/app#a", "/app#a"},
      {"/apple", "/app/apple"},
      {"//host/login", "//host/login"},
      {"login", "login"},
      {"../login", "../login"},
      {"http://test/login", "http://test/app/login"},
      {"http://test/app/login", "http://test/app/login"},
      {"http://test", "http://test/app"},
      {"https://test/login", "https://test/app/login"},
      {"http://test:8080/login", "http://test/app/login"},
      {"http://localhost:8080/login", "http://test/app/login"},
      {"http://test.example/login", "http://test.example/login"},
  };
  for (const auto &c : cases) {
    CAPTURE(c.sent);
    CHECK(location_for("/app/x", "Host: test\r\n", c.sent, stripping()) ==
          c.arrives);
  }
  // Nothing was removed from this request's target.
  CHECK(location_for("/x", "Host: test\r\n", "/login", stripping()) ==
        "/login");
  CHECK(location_for("/x", "Host: test\r\n", "http://test:8080/login",
                     stripping()) == "http://test/login");
}

// ---- Caching

TEST_CASE(
    "caching: cdn_cache is for scripts and style sheets that all may see") {
  const struct {
    const char *request, *asked, *status, *lines;
    bool cached;
  } cases[] = {
      {"GET /a.js", "", "200", "", true},
      {"GET /a.css?v=1", "", "200", "", true},
      {"GET /a", "", "200", "Content-Type: text/css\r\n", true},
      {"GET /a", "", "200", "Content-Type: Text/JavaScript ;charset=x\r\n",
       true},
      {"HEAD /a.js", "", "200", "", true},
      {"GET /a.js", "", "304", "", true},
      {"GET /a.js", "", "200", "Content-Type: application/octet-stream\r\n",
       true},
      {"GET /a.js", "", "200", "Cache-Control: max-age=60\r\n", true},
      {"GET /a.js", "", "200", "Vary: Accept-Encoding\r\n", true},
      {"GET /a.js", "Cookie: a=1\r\n", "200", "", true},
      // The type decides
      {"GET /account/x.css", "", "200", "Content-Type: text/html\r\n", false},
      {"GET /a.js", "", "200", "Content-Type: application/json\r\n", false},
      {"GET /a", "", "200", "", false},
      {"GET /?a.js", "", "200", "", false},
      // Not for all
      {"GET /a.js", "Authorization: x\r\n", "200", "", false},
      {"GET /a.js", "", "200", "Set-Cookie: a=1\r\n", false},
      {"GET /a.js", "", "200", "Vary: Accept, cookie\r\n", false},
      {"GET /a.js", "", "200", "Vary: A\r\nVary: *\r\n", false},
      {"GET /a.js", "", "200", "Cache-Control: max-age=1, No-Store\r\n", false},
      {"GET /a.js", "", "200", "Cache-Control: private=\"a\"\r\n", false},
      {"GET /a.js", "", "200", "Cache-Control: no-cache\r\n", false},
      {"GET /a.js", "", "200", "CDN-Cache-Control: no-store\r\n", false},
      {"GET /a.js", "", "200", "Cache-Control : no-store\r\n", false},
      {"GET /a.js", "", "200", "Cache-Control: a,\r\n private\r\n", false},
      // Other requests and responses
      {"POST /a.js", "", "200", "", false},
      {"GET /a.js", "", "404", "", false},
  };
  Situation setting;
  setting.config.cdn_cache = std::chrono::seconds(60);
  for (const auto &c : cases) {
    CAPTURE(c.request);
    CAPTURE(c.lines);
    const auto head =
        answered(head_of(c.request + " HTTP/1.1"s, "Host: a\r\n"s + c.asked),
                 head_of("HTTP/1.1 "s + c.status + " OK", c.lines), setting);
    const bool cached =
        contains(head, "Cache-Control: public, s-maxage=60\r\n"
                       "CDN-Cache-Control: public, max-age=60\r\n"
                       "Vercel-CDN-Cache-Control: public, max-age=60\r\n");
    CHECK(cached == c.cached);
    if (cached) { CHECK(!contains(head, "max-age=60\r\nCache")); }
  }
}

TEST_CASE("caching: what a CDN keeps does not say how long we took") {
  RequestHead asked;
  REQUIRE(!parse_request(head_of("GET /a.js HTTP/1.1", "Host: a\r\n"), asked));
  ResponseHead answer;
  REQUIRE(!parse_response(head_of("HTTP/1.1 200 OK", ""), "GET", answer));
  Situation setting;
  for (const int age : {0, 60}) {
    setting.config.cdn_cache = std::chrono::seconds(age);
    std::string out;
    HeadWriter(asked, setting.forwarding(), out)
        .write_response(answer, true, "Server-Timing: x\r\n");
    CHECK(contains(out, "Server-Timing") == (age == 0));
  }
}

TEST_CASE("forwarding: the status line keeps the space of an empty reason") {
  const auto request = head_of("GET / HTTP/1.1", "Host: a\r\n");
  for (const std::string line : {"HTTP/1.1 200", "HTTP/1.1 200 "}) {
    CHECK(answered(request, head_of(line, "A: 1\r\n")) ==
          "HTTP/1.1 200 \r\nA: 1\r\n\r\n");
  }
}

TEST_CASE("forwarding: a prefix counts without the slashes around it") {
  for (const auto *given : {"a/b", "/a/b", "//a/b//"}) {
    CHECK(normalized_prefix(given) == "/a/b");
  }
  for (const auto *given : {"", "/", "//"}) {
    CHECK(normalized_prefix(given) == "");
  }
}

TEST_CASE("forwarding: CORS is answered for the target") {
  Situation setting;
  setting.config.cors_origins = {"https://a.example"};
  const auto request = [](const std::string &lines) {
    return head_of("GET / HTTP/1.1", "Host: test\r\n" + lines);
  };
  const std::string response =
      "HTTP/1.1 200 OK\r\nAccess-Control-Allow-Origin: *\r\nA: 1\r\n\r\n";
  CHECK(answered(request("Origin: HTTPS://a.example\r\n"), response, setting) ==
        "HTTP/1.1 200 OK\r\nA: 1\r\nVary: Origin\r\n"
        "Access-Control-Allow-Origin: HTTPS://a.example\r\n"
        "Access-Control-Allow-Credentials: true\r\n\r\n");
  CHECK(answered(request("Origin: https://b.example\r\n"), response, setting) ==
        "HTTP/1.1 200 OK\r\nA: 1\r\nVary: Origin\r\n\r\n");
  CHECK(answered(request(""), response) == response);
  const std::string hints = "HTTP/1.1 103 Early Hints\r\nA: 1\r\n\r\n";
  CHECK(answered(request("Origin: https://a.example\r\n"), hints, setting) ==
        hints);
}
