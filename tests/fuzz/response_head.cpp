// The same for a response head. A target's is repaired where it can be, but
// what goes on to the client never has more than one reading.

#include "../../warmproxy.hpp"

#include "reference.hpp"

namespace {

using namespace warmproxy::detail;

bool is_framing(const Field &field) {
  return field.is("Content-Length") || field.is("Transfer-Encoding");
}

void compare(const ResponseHead &head, const reference::Head &expected) {
  REQUIRE(head.status == expected.status, "another status");
  REQUIRE(head.status_and_reason == expected.reason, "another reason");
  REQUIRE(head.minor == expected.minor, "another version");
  REQUIRE(reference::clean(head.status_and_reason), "a reason that is none");
  REQUIRE(head.fields.size() == expected.lines.size(), "another head");
  for (std::size_t i = 0; i < head.fields.size(); ++i) {
    const auto &field = head.fields[i];
    const auto &line = expected.lines[i];
    REQUIRE(reference::lower(field.name) == line.name, "another name");
    REQUIRE(field.value == line.value, "another value");
    REQUIRE(is_framing(field) || field.line == line.raw, "another line");
    REQUIRE(reference::harmless(field.line), "a line that is none");
  }
  const auto mode = head.framing.mode();
  switch (expected.body.kind) {
  case reference::Body::none:
    REQUIRE(mode == Framing::Mode::none, "a body where none can be");
    break;
  case reference::Body::chunked:
    REQUIRE(mode == Framing::Mode::chunked, "not chunked");
    break;
  case reference::Body::until_close:
    REQUIRE(mode == Framing::Mode::until_close, "not until close");
    break;
  case reference::Body::length: {
    REQUIRE(mode == Framing::Mode::length, "no length");
    if (expected.body.size > 4096) { break; }
    auto framing = head.framing;
    REQUIRE(framing.take(std::string(5000, 'x')) == expected.body.size,
            "another length");
    break;
  }
  }
  REQUIRE(head.keep_alive == expected.keep_alive(), "another keep-alive");
}

// What the client gets.
void check_forwarded(const ResponseHead &head, const reference::Head &expected,
                     std::string_view method) {
  RequestHead request;
  REQUIRE(
      !parse_request(std::string(method) + " /a/b HTTP/1.1\r\nHost: a\r\n\r\n",
                     request),
      "no request");
  Config config;
  config.prefix = "/a";
  std::string out;
  HeadWriter(request, {config, "192.0.2.7", {false, 1}}, out)
      .write_response(head, true, "");
  const auto forwarded = reference::response(out, method, false);
  REQUIRE(forwarded, "what is forwarded is no response");
  REQUIRE(forwarded->reason == reference::sent_reason(expected.reason),
          "another reason is forwarded");
  REQUIRE(forwarded->body.kind == expected.body.kind &&
              forwarded->body.size == expected.body.size,
          "another body is forwarded");
}

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t *data,
                                      std::size_t size) {
  if (size < 1) { return 0; }
  const auto method = data[0] % 4 == 0 ? "HEAD" : "GET";
  const std::string_view bytes(reinterpret_cast<const char *>(data) + 1,
                               size - 1);
  const auto end = head_end(bytes);
  REQUIRE(end == reference::head_of(bytes, true).size(), "another end");
  if (end == 0) { return 0; }

  const auto text = bytes.substr(0, end);
  ResponseHead head;
  const auto refusal = parse_response(std::string(text), method, head);
  const auto expected = reference::response(text, method, true);
  if (refusal) {
    REQUIRE(refusal.status == 502 && *refusal.reason, "not a bad gateway");
    REQUIRE(!expected, "the reference accepts it");
    return 0;
  }
  REQUIRE(expected, "the reference refuses it");
  compare(head, *expected);

  REQUIRE(head.must_close || head.repairs.empty(), "a repair is not told");
  REQUIRE(!head.must_close || !head.repairs.empty() || head.status == 304,
          "must close, but why?");

  // Line by line with proper ends, it is the same to a strict reader.
  std::string again = "HTTP/1." + std::to_string(head.minor) + " " +
                      std::string(head.status_and_reason);
  for (const auto &field : head.fields) {
    again += "\r\n";
    again += is_framing(field) ? concat(field.name, ": ", field.value)
                               : std::string(field.line);
  }
  again += "\r\n\r\n";
  const auto strict = reference::response(again, method, false);
  REQUIRE(strict, "refused a second time");
  compare(head, *strict);
  ResponseHead repaired;
  REQUIRE(!parse_response(again, method, repaired), "refused a second time");
  REQUIRE(repaired.repairs.empty(), "repaired a second time");

  check_forwarded(head, *strict, method);
  return 0;
}
