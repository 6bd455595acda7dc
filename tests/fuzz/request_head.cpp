// A request head is accepted if and only if the reference accepts it, and then
// is the same request to both. What we forward is that request, too.

#include "../../warmproxy.hpp"

#include "reference.hpp"

namespace {

using namespace warmproxy::detail;

void compare(const RequestHead &head, const reference::Head &expected) {
  REQUIRE(head.method == expected.method, "another method");
  REQUIRE(head.request_target == expected.target, "another target");
  REQUIRE(head.authority == expected.authority, "another authority");
  REQUIRE(head.minor == expected.minor, "another version");
  REQUIRE(head.fields.size() == expected.lines.size(), "another head");
  for (std::size_t i = 0; i < head.fields.size(); ++i) {
    const auto &field = head.fields[i];
    const auto &line = expected.lines[i];
    REQUIRE(reference::lower(field.name) == line.name, "another name");
    REQUIRE(field.value == line.value, "another value");
    REQUIRE(field.line == line.raw, "another line");
    REQUIRE(reference::clean(field.line), "a line that is none");
  }
  const auto mode = head.framing.mode();
  switch (expected.body.kind) {
  case reference::Body::none:
    REQUIRE(mode == Framing::Mode::none, "a body");
    REQUIRE(head.framing.done(), "a body without end");
    break;
  case reference::Body::chunked:
    REQUIRE(mode == Framing::Mode::chunked, "not chunked");
    break;
  case reference::Body::length: {
    REQUIRE(mode == Framing::Mode::length, "no length");
    // Only small ones can be seen from outside.
    if (expected.body.size > 4096) { break; }
    auto framing = head.framing;
    REQUIRE(framing.take(std::string(5000, 'x')) == expected.body.size,
            "another length");
    break;
  }
  case reference::Body::until_close: REQUIRE(false, "no request has it");
  }
  REQUIRE(head.keep_alive == expected.keep_alive(), "another keep-alive");
  REQUIRE(head.upgrades() == expected.upgrade(), "another upgrade");
}

// The head, written out again.
std::string restated(const RequestHead &head) {
  std::string target(head.request_target);
  if (!head.authority.empty()) {
    target =
        "http://" + std::string(head.authority) + (target == "*" ? "" : target);
  }
  std::string text = std::string(head.method) + " " + target + " HTTP/1." +
                     std::to_string(head.minor) + "\r\n";
  for (const auto &field : head.fields) {
    text += std::string(field.line) + "\r\n";
  }
  return text + "\r\n";
}

// What the target gets.
void check_forwarded(const RequestHead &head, const reference::Head &expected,
                     Config config) {
  std::string out;
  HeadWriter(head, {config, "192.0.2.7", {false, 1}}, out).write_request();
  const auto forwarded = reference::request(out);
  REQUIRE(forwarded, "what is forwarded is no request");
  REQUIRE(forwarded->method == expected.method, "another method is forwarded");
  REQUIRE(forwarded->minor == 1, "another version is forwarded");
  REQUIRE(forwarded->authority.empty(), "absolute-form is forwarded");
  REQUIRE(forwarded->body.kind == expected.body.kind &&
              forwarded->body.size == expected.body.size,
          "another body is forwarded");
  REQUIRE(forwarded->upgrade() == expected.upgrade(), "another upgrade");
  REQUIRE(config.behind_trusted_proxy() ||
              forwarded->values("x-forwarded-for") ==
                  std::vector<std::string>{"192.0.2.7"},
          "a client is believed");
}

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t *data,
                                      std::size_t size) {
  if (size < 1) { return 0; }
  const std::string_view bytes(reinterpret_cast<const char *>(data) + 1,
                               size - 1);
  const auto end = head_end(bytes);
  REQUIRE(end <= bytes.size(), "a head beyond its end");

  // As it is looked for while bytes come in.
  reference::Portions portions(data[0]);
  std::size_t found = 0;
  for (std::size_t n = 0, before = 0; !found && n < bytes.size(); before = n) {
    n = std::min(bytes.size(), n + portions.next());
    found = head_end(bytes.substr(0, n), before);
  }
  REQUIRE(found == end, "in portions it has another end");
  REQUIRE(end == reference::head_of(bytes, true).size(), "another end");
  if (end == 0) { return 0; }

  const auto text = bytes.substr(0, end);
  RequestHead head;
  const auto refusal = parse_request(std::string(text), head);
  const auto expected = reference::request(text);
  if (refusal) {
    REQUIRE(head.fields.empty(), "something of a refused head is left");
    REQUIRE(refusal.status >= 400 && refusal.status < 600, "no error");
    REQUIRE(*refusal.reason, "no reason");
    REQUIRE(!expected, "the reference accepts it");
    return 0;
  }
  REQUIRE(expected, "the reference refuses it");
  compare(head, *expected);
  for (std::size_t n = 0; n < std::min<std::size_t>(end, 300); ++n) {
    REQUIRE(!early_refusal(bytes.substr(0, n)), "refused too early");
  }
  Config config;
  check_forwarded(head, *expected, config);
  config.trust_proxy = true;
  config.prefix = "/a";
  check_forwarded(head, *expected, config);

  RequestHead again;
  const auto text_again = restated(head);
  REQUIRE(head_end(text_again) == text_again.size(), "it does not end there");
  REQUIRE(parse_request(text_again, again).status == 0,
          "refused a second time");
  compare(again, *expected);
  return 0;
}
