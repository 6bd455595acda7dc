// Bytes that are not HTTP, shared by the tests of heads, framing and limits.

#ifndef WARMPROXY_TESTS_MALFORMED_HPP
#define WARMPROXY_TESTS_MALFORMED_HPP

#include "support.hpp"

#include <doctest/doctest.h>

namespace support {

using namespace std::string_literals; // for bytes after a NUL

inline const std::string smuggled =
    "GET /smuggled HTTP/1.1\r\nHost: test\r\n\r\n";

// A request with these header lines.
inline std::string with(const std::string &lines) {
  return "POST / HTTP/1.1\r\nHost: test\r\n" + lines + "\r\n\r\n";
}
inline std::string requesting(const std::string &line) {
  return line + "\r\nHost: test\r\n\r\n";
}

inline std::vector<std::string> bad_chunks() {
  return {"g\r\n"s,
          "\r\n"s,
          ";x\r\n"s,
          "\r\n\r\n"s,
          ";x\r\n\r\n"s,
          "-1\r\n"s,
          "+1\r\na\r\n0\r\n\r\n"s,
          "0x1\r\na\r\n0\r\n\r\n"s,
          "1h\r\na\r\n0\r\n\r\n"s,
          " 1\r\na\r\n0\r\n\r\n"s,
          "1 \r\na\r\n0\r\n\r\n"s,
          "1\t\r\na\r\n0\r\n\r\n"s,
          "1_0\r\n"s,
          "1,1\r\n"s,
          "\xEF\xBC\x91\r\na\r\n0\r\n\r\n"s,
          "1\na\r\n0\r\n\r\n"s,
          "1\ra\r\n0\r\n\r\n"s,
          "1\r\r\na\r\n0\r\n\r\n"s,
          "1;x\na\r\n0\r\n\r\n"s,
          "1;x\ry\r\na\r\n0\r\n\r\n"s,
          "1;x\x01\r\na\r\n0\r\n\r\n"s,
          "1;\0\r\na\r\n0\r\n\r\n"s,
          "1\0\r\na\r\n0\r\n\r\n"s,
          "1;" + std::string(70000, 'x') + "\r\na\r\n0\r\n\r\n",
          std::string(70000, '0') + "1\r\na\r\n0\r\n\r\n",
          "1\r\nab\r\n0\r\n\r\n"s,
          "2\r\na\r\n0\r\n\r\n"s,
          "1\r\na\n0\r\n\r\n"s,
          "1\r\na\r0\r\n\r\n"s,
          "1\r\na0\r\n\r\n"s,
          "1\r\na\r\n\r\n0\r\n\r\n"s,
          "1\r\naxx0\r\n\r\n"s,
          "1\r\na\n\n0\r\n\r\n"s,
          "1\r\na\r\r0\r\n\r\n"s,
          "1\r\nax\n0\r\n\r\n"s,
          "1\r\na\rx0\r\n\r\n"s,
          "8000000000000000\r\n"s,
          "ffffffffffffffff\r\n"s,
          "10000000000000000\r\n"s,
          "10000000000000001\r\na\r\n0\r\n\r\n"s,
          "fffffffffffffffffffffffffffffffff\r\n"s,
          "0\n\r\n"s,
          "0\r\n\n"s,
          "0\r\n\rx"s,
          "0\r\n x: 1\r\n\r\n"s,
          "0\r\nx\r\n\r\n"s,
          "0\r\n: 1\r\n\r\n"s,
          "0\r\nx : 1\r\n\r\n"s,
          "0\r\nx: 1\n\r\n"s,
          "0\r\nx: 1\r\n 2\r\n\r\n"s,
          "0\r\nx: a\rb\r\n\r\n"s,
          "0\r\nx: \0\r\n\r\n"s,
          "0\r\nx: 1\r\n\n"s,
          "0\r\nx: " + std::string(70000, 'x') + "\r\n\r\n"};
}

// Whether it is malformed for a client only.
inline bool has_blanks_around_size(const std::string &chunk) {
  return chunk.compare(0, 4, " 1\r\n") == 0 ||
         chunk.compare(0, 4, "1 \r\n") == 0 ||
         chunk.compare(0, 4, "1\t\r\n") == 0;
}

// The beginning of `bytes`, printable.
inline std::string shown(const std::string &bytes) {
  std::string text;
  for (const char c : bytes.substr(0, 60)) {
    char escaped[8];
    std::snprintf(escaped, sizeof(escaped),
                  c > ' ' && c < 127 ? "%c" : "\\x%02x",
                  static_cast<unsigned char>(c));
    text += escaped;
  }
  return text;
}

inline void send_bytewise(RawClient &client, const std::string &text) {
  for (const char c : text) {
    if (!client.send({&c, 1})) { return; } // refused before the end
  }
}

// Expects one error response and the end of the connection.
inline void check_refused(RawClient &client, int status) {
  const auto response = client.read_response();
  CHECK(response.status == status);
  CHECK(response.complete);
  CHECK(response.header("Connection") == "close");
  CHECK(response.header("Content-Type").find("text/plain") == 0);
  CHECK(response.body.find("warmproxy: ") == 0);
  CHECK(response.body.find('\n') == response.body.size() - 1);
  CHECK(client.read_to_end() == "");
}

} // namespace support

#endif
