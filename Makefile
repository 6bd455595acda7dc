# Builds warmproxy, runs it, and writes the function for Vercel. In a folder of
# your own, copy this file, warmproxy.hpp and main.cpp. `make help` lists the
# targets. Missing packages are installed with apt-get where that is possible.

SHELL := /bin/bash
.DELETE_ON_ERROR:

BUILD ?= build
CXX ?= g++
CXXFLAGS ?= -O2
STANDARD := -std=c++17 -pthread

# A httplib.h beside warmproxy.hpp takes precedence over the system's package.
# Evaluated by the recipe, because the package may just have been installed.
HTTPLIB_FLAGS = $$(test -e httplib.h || pkg-config --cflags cpp-httplib)
HTTPLIB_LIBS = $$(test -e httplib.h || pkg-config --libs cpp-httplib)
OWN_HTTPLIB := $(wildcard httplib.h)

.PHONY: all run vercel need-httplib clean help
all: $(BUILD)/warmproxy ## build build/warmproxy from main.cpp (the default)

$(BUILD)/warmproxy: main.cpp warmproxy.hpp $(OWN_HTTPLIB) | need-httplib
	@mkdir -p $(@D)
	$(CXX) $(STANDARD) $(CXXFLAGS) $(HTTPLIB_FLAGS) $< -o $@ $(HTTPLIB_LIBS)

# ARGS are BINARY's arguments, in which {port} is its port, TARGET_PORT (0 picks
# a free one). warmproxy itself listens on HOST and PORT.
DEMO := $(if $(wildcard tests/demo.cpp),$(BUILD)/demo)
run: export WARMPROXY_BINARY := $(or $(BINARY),$(DEMO))
run: export WARMPROXY_ARGS := $(ARGS)
run: export WARMPROXY_TARGET_PORT := $(or $(TARGET_PORT),0)
run: $(BUILD)/warmproxy $(if $(BINARY),,$(DEMO)) ## run the demo, or BINARY= ARGS= TARGET_PORT= PORT=
	@$(if $(BINARY)$(DEMO),,echo 'warmproxy: nothing to run: set BINARY' >&2; exit 2)
	@exec $(BUILD)/warmproxy

# ---- Vercel ------------------------------------------------------------------
#
#   make -C api vercel ROOT=.. BINARY=./artalk ARGS=server TARGET_PORT=23366
#
# writes ROOT/.vercel/output (Build Output API v3). Besides a compiler and make
# this needs only what Amazon Linux 2023 has: bash, coreutils, sed, grep, gawk.
#
#   BINARY  the program. Without it BUNDLE contains it and main.cpp runs it;
#           without both, the function runs the demo
#   BUNDLE  further files and folders; patterns and quotes as in a shell
#   ROOT    the project's root, to which BINARY and BUNDLE are relative
#   ARGS, TARGET_PORT, WARMPROXY_<SETTING>=...  for the function's environment
#   MAX_DURATION  seconds a request may take, or max: what the plan allows
#   REGIONS, MEMORY  where to run ('fra1 iad1'), and with how many MB
#   RUNTIME_LANGUAGE  rust or go. Both have the same contract; rust, since
#           Vercel documents Fluid compute and SIGTERM for it
vercel: export ROOT = .
vercel: export MAX_DURATION = 300
vercel: export REGIONS =
vercel: export MEMORY =
vercel: export RUNTIME_LANGUAGE = rust
# The C library of Amazon Linux 2023, on which functions run.
vercel: export FUNCTION_GLIBC = 2.34
STANDALONE := build/vercel/$(shell $(CXX) -dumpmachine 2>/dev/null)
# Debian's package is a shared library; a static link needs the whole header.
WHOLE_HTTPLIB = $(firstword $(wildcard httplib.h) build/_httplib/httplib.h)

# Both scripts get to the shell unchanged: make does not expand their dollars.
define WRITE_FUNCTION
set -euo pipefail
say() { echo "warmproxy: $*" >&2; }
stop() { say "$*"; exit 1; }
expect() { [[ ${!1} =~ ^($2)$ ]] || stop "$1 is '${!1}': expected $3"; } # NAME PATTERN MEANING
expect MAX_DURATION '[1-9][0-9]{0,4}|max' 'a number of seconds, or max'
expect MEMORY '([1-9][0-9]{2,4})?' 'a number of MB, such as 2048'
expect REGIONS ' *([a-z]{3}[0-9]( +|$))*' "names such as 'fra1 iad1'"
expect RUNTIME_LANGUAGE 'go|rust' 'go or rust'

machine=${STANDALONE##*/}
case $machine in
x86_64-*linux*) arch=x86_64 elf_machine=3e00 ;;
aarch64-*linux*) arch=arm64 elf_machine=b700 ;;
'') stop "no such compiler: CXX=$CXX" ;;
*) stop "CXX=$CXX builds for $machine: a function runs on Linux, x86_64 or arm64" ;;
esac
is_program() { # An ELF file; stops if it is for another machine.
  case $(od -An -tx1 -N20 "$1" | tr -d ' \n') in
  7f454c4602??????????????????????????$elf_machine) ;;
  7f454c46*) stop "$1 is a program, but not for Linux on $arch, where the function runs" ;;
  *) return 1 ;;
  esac
}

here=$PWD demo= && cd "$ROOT"
function=$PWD/.vercel/output/functions/api.func
eval "set -- ${BUNDLE-}"
for file; do
  test -e "$file" || stop "BUNDLE names $file: no such file in $PWD"
  test ! "$file" -ef . || stop "BUNDLE names $file, which is all of $PWD: name what the program needs"
done
if test -n "${BINARY-}"; then
  test -f "$BINARY" || stop "BINARY names $BINARY: no such file in $PWD"
  is_program "$BINARY" || case $(head -c 2 "$BINARY") in
  '#!') say "$BINARY is a script: its interpreter must be in the function too" ;;
  *) stop "$BINARY is not a Linux program: it begins with \"$(head -c 24 "$BINARY" | tr -cd ' -~')\"" ;;
  esac
elif test $# = 0; then
  test -f "$here/tests/demo.cpp" ||
    stop "nothing to run: make vercel BINARY=./program ARGS='its arguments' TARGET_PORT=its-port BUNDLE='files it needs'"
  say "no BINARY and no BUNDLE: using the demo"
  demo=$STANDALONE/demo BINARY=$here/$STANDALONE/demo
fi
"$MAKE" --no-print-directory -C "$here" "$STANDALONE/executable" $demo

rm -rf "$function" && mkdir -p "$function"
shopt -s globstar dotglob nullglob
cp "$here/$STANDALONE"/executable "$here/$STANDALONE"/*.so.? "$function"
add() { # Copies to the same place below the root, what is outside into the root.
  case $1 in /* | .. | ../* | */../*) to=${1%/} to=${to##*/} ;; *) to=${1%/} to=${to#./} ;; esac
  case $to in executable | .vc-config.json) stop "$1 cannot be added: $to is a file of warmproxy's in the function" ;; esac
  mkdir -p "$function/$(dirname "$to")"
  if test -d "$1"; then set -- "$1/."; mkdir -p "$function/$to"; fi
  cp -RLp "$1" "$function/$to"
}
for file; do add "$file"; done
if test -n "${BINARY-}"; then
  add "$BINARY"
  chmod +x "$function/$to"
  export WARMPROXY_BINARY="./$to" WARMPROXY_ARGS="${ARGS-}" WARMPROXY_TARGET_PORT="${TARGET_PORT:-0}"
else
  test -z "${ARGS-}" || export WARMPROXY_ARGS="$ARGS"
  test -z "${TARGET_PORT-}" || export WARMPROXY_TARGET_PORT="$TARGET_PORT"
fi

for file in "$function"/**; do
  test -f "$file" -a -x "$file" && is_program "$file" || continue
  needs=$({ grep -a -o 'GLIBC_2\.[0-9]*' "$file" || :; } | cut -d_ -f2 | sort -V | tail -n 1)
  test "$(printf '%s\n' "$FUNCTION_GLIBC" "$needs" | sort -V | tail -n 1)" != "$FUNCTION_GLIBC" || continue
  what="needs version $needs of the C library, and a function has $FUNCTION_GLIBC"
  test "$file" != "$function/executable" || stop "executable $what: link it statically, or build on an older system"
  say "${file##*/} may not start: it $what; use a static build if there is one"
done
size=$(du -sm "$function" | cut -f1)
test "$size" -lt 250 || stop "the function has $size MB: Vercel's limit is 250 MB"

{ compgen -e WARMPROXY_ || :; } | sort | awk -v arch="$arch" '
  function quote(text) {
    gsub(/\\/, "&&", text); gsub(/"/, "\\\"", text); gsub(/\t/, "\\t", text); gsub(/\n/, "\\n", text)
    return "\"" text "\""
  }
  function put(name, value) { printf "%s\n%s%s: %s", separator, indent, quote(name), value; separator = "," }
  BEGIN {
    printf "{"; indent = "  "
    put("runtime", quote("executable")); put("handler", quote("executable"))
    put("runtimeLanguage", quote(ENVIRON["RUNTIME_LANGUAGE"])); put("architecture", quote(arch))
    put("supportsResponseStreaming", "true"); put("supportsCancellation", "true")
    duration = ENVIRON["MAX_DURATION"]; put("maxDuration", duration == "max" ? quote(duration) : duration)
    if (ENVIRON["MEMORY"]) put("memory", ENVIRON["MEMORY"])
    count = split(ENVIRON["REGIONS"], regions, " ")
    for (i = 1; i <= count; i++) list = list (i > 1 ? ", " : "") quote(regions[i])
    if (count) put("regions", "[" list "]")
    put("environment", "{"); indent = "    "; separator = ""
  }
  { put($0, quote(ENVIRON[$0])) }
  END { print "\n  }\n}" }' >"$function/.vc-config.json"
# The CLI merges the routes of vercel.json into this file.
test -f .vercel/output/config.json || echo '{ "version": 3 }' >.vercel/output/config.json
say "wrote $ROOT/.vercel/output/functions/api.func, $size MB for $arch: $(ls "$function" | tr '\n' ' ')"
endef

# Where a static link is not possible, the C++ libraries are deployed too.
define LINK_STANDALONE
set -eu
missing() { for file in libc.a libstdc++.a; do test -f "$($CXX -print-file-name=$file)" || echo $file; done; }
if test -n "$(missing)" && command -v dnf >/dev/null && test "$(id -u)" = 0; then
  echo "warmproxy: installing glibc-static libstdc++-static" >&2 # on Vercel's build image
  dnf install -y -q glibc-static libstdc++-static >&2 || :
fi
source=$1 output=$2 && set -- -std=c++17 -Os -ffunction-sections -fdata-sections -pthread -I"$INCLUDE" "$source" -o "$output" -s -Wl,--gc-sections
if test -z "$(missing)"; then
  # The linker warns that getaddrinfo may load libraries: not for numeric hosts.
  $CXX "$@" -static 2>"$output.log" || { cat "$output.log" >&2; exit 1; }
  grep -v -e 'in function' -e 'statically linked applications' -e 'linker garbage collection' "$output.log" >&2 || :
else
  echo "warmproxy: ${output##*/} is linked dynamically, since" $(missing) "is missing:" \
    "install glibc-static libstdc++-static (Amazon Linux, Fedora) or g++ (Debian)" >&2
  cp -L "$($CXX -print-file-name=libstdc++.so.6)" "$($CXX -print-file-name=libgcc_s.so.1)" "$(dirname "$output")"
  $CXX "$@" -Wl,-rpath,'$ORIGIN'
fi
endef

vercel: export WRITE_FUNCTION := $(value WRITE_FUNCTION)
vercel: export STANDALONE := $(STANDALONE)
vercel: export MAKE := $(MAKE)
vercel: ## write the function for Vercel: BINARY= ARGS= TARGET_PORT= BUNDLE= ROOT=
	+@bash -c "$$WRITE_FUNCTION"

$(STANDALONE)/%: export LINK_STANDALONE := $(value LINK_STANDALONE)
$(STANDALONE)/%: export INCLUDE = $(dir $(WHOLE_HTTPLIB))
vercel $(STANDALONE)/%: export CXX := $(CXX)
$(STANDALONE)/executable: main.cpp warmproxy.hpp
$(STANDALONE)/%: $(WHOLE_HTTPLIB)
	@mkdir -p $(@D)
	@bash -c "$$LINK_STANDALONE" bash $(filter %.cpp,$^) $@

# ---- cpp-httplib -------------------------------------------------------------

HTTPLIB_VERSION := v0.53.1
HTTPLIB_SHA256 := bc69d53636a8757cb24a1deb9880bf7e2fdae3a80bbc759e145b8c80913cbfa3
HTTPLIB_URL := https://raw.githubusercontent.com/yhirose/cpp-httplib/$(HTTPLIB_VERSION)/httplib.h

# The second is for what needs the whole header, without precedence over the
# system's package in the other builds.
##httplib.h: fetch cpp-httplib's pinned release, which is then used
httplib.h build/_httplib/httplib.h:
	@mkdir -p $(@D)
	@if (curl -fsSL --connect-timeout 10 -m 120 $(HTTPLIB_URL) || wget -qO- -T 120 -t 1 $(HTTPLIB_URL)) >$@.new 2>/dev/null; then \
	  echo '$(HTTPLIB_SHA256)  $@.new' | sha256sum -c --status || \
	    { echo 'warmproxy: $(HTTPLIB_URL) does not have the expected checksum' >&2; exit 1; }; \
	  mv $@.new $@; echo 'warmproxy: $@ is cpp-httplib $(HTTPLIB_VERSION)'; \
	else $(call httplib_from_debian,$@); fi

# From Debian's newest source package, whose signature apt checks. With package
# lists of our own: needs no root and changes no setting of the machine.
define httplib_from_debian
  echo 'warmproxy: cannot fetch $(HTTPLIB_URL): trying the source package of Debian'; \
  mirror=$$(apt-get indextargets --format '$$(REPO_URI)' 'Created-By: Packages' | grep -v -m1 security) && \
  { command -v xz >/dev/null || { $(call install,xz-utils); }; } && \
  rm -rf build/_source && mkdir -p build/_source/{lists/partial,cache/archives/partial} && cd build/_source && \
  apt="apt-get -qq -o Dir::Etc::SourceList=$$PWD/sources.list -o Dir::Etc::SourceParts=/dev/null -o Dir::State::Lists=$$PWD/lists -o Dir::Cache=$$PWD/cache" && \
  for suite in sid trixie bookworm; do \
    echo "deb-src $$mirror $$suite main" >sources.list; \
    { $$apt update && $$apt source --download-only cpp-httplib; } >log 2>&1 && break; \
  done; \
  cd $(CURDIR) && archive=$$(ls build/_source/*.orig.tar.*) && tar -xOf $$archive --wildcards '*/httplib.h' >$(1).new && \
  mv $(1).new $(1) && echo "warmproxy: $(1) is from $${archive##*/}" || \
  { tail -n 5 build/_source/log; echo 'warmproxy: cannot get httplib.h: put one beside warmproxy.hpp'; exit 1; } >&2
endef

# $(call need,a command that fails if it is missing,packages)
define need
	@{ $(1); } >/dev/null 2>&1 || { $(call install,$(2)); }
endef

# One at a time, for `make -j`. Debian's package lists may be old or missing.
define install
  command -v apt-get >/dev/null && if test "$$(id -u)" = 0; then as=; else as=sudo; test -t 0 || sudo -n true; fi 2>/dev/null || \
  { echo "warmproxy: missing packages: apt-get install $(1)" >&2; exit 1; }; \
  echo "warmproxy: installing $(1)"; mkdir -p build; exec 9>build/apt.lock; flock 9; \
  get() { $$as env DEBIAN_FRONTEND=noninteractive apt-get "$$@" >build/apt.log 2>&1; }; \
  get install -y --no-install-recommends $(1) || { get update && get install -y --no-install-recommends $(1); } || \
  { tail -n 5 build/apt.log >&2; echo "warmproxy: missing packages: apt-get install $(1)" >&2; exit 1; }
endef

need-httplib:
	$(call need,test -e httplib.h || pkg-config --exists cpp-httplib,libcpp-httplib-dev pkg-config)
clean: ## remove build/
	rm -rf build
help: ## show this list
	@sed -n -E 's/^([a-z.-]+):[^#]*## /\1\t/p; s/^##([a-z.]+): /\1\t/p' $(filter %Makefile,$(MAKEFILE_LIST)) | \
	  awk -F'\t' '{ printf "make %-14s %s\n", $$1, $$2 }'

# Everything else (test, check, bench and so on), where the tests are.
-include tests/Makefile
