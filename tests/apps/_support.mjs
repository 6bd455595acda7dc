// Shared by the acceptance tests: warmproxy as a child process, an HTTP client
// that keeps responses as they arrived, and a test runner.

import assert from 'node:assert/strict';
import { spawn, spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import fs from 'node:fs';
import http from 'node:http';
import { createRequire } from 'node:module';
import net from 'node:net';
import os from 'node:os';
import path from 'node:path';
import { setTimeout as pause } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';

export const here = path.dirname(fileURLToPath(import.meta.url));
export const build =
    path.resolve(process.env.APPS_BUILD || path.join(here, '../../build'));
const proxy_binary =
    path.resolve(process.env.APPS_PROXY || path.join(build, 'warmproxy'));

/** A package from npm, from the folder into which the Makefile installs. */
export const npm = createRequire(path.join(build, 'node', 'any'));

// ---------------------------------------------------------------- the runner

let passed = 0;
let failed = 0;
let skipped = 0;
let cleanups = [];

/** Registers cleanup for the end of the group; the last one runs first. */
export function defer(action) { cleanups.push(action); }

async function clean_up() {
  while (cleanups.length) {
    try {
      await cleanups.pop()();
    } catch (error) {
      failed++;
      console.log(`  FAILED at the end of the group: ${error.message}`);
    }
  }
}

const only = process.env.APPS_ONLY ? new RegExp(process.env.APPS_ONLY) : null;

export async function test(name, body, deadline = 60000) {
  if (only && !only.test(name)) { return; }
  let timer;
  const late = new Promise((_, reject) => {
    timer = setTimeout(
        () => reject(new Error(`not done within ${deadline / 1000} s`)),
        deadline);
  });
  try {
    await Promise.race([body(), late]);
    passed++;
    console.log(`  ok      ${name}`);
  } catch (error) {
    failed++;
    console.log(`  FAILED  ${name}\n${indent(error.stack || String(error))}`);
  } finally { clearTimeout(timer); }
}

/** Counts what cannot run here as skipped, with the reason. */
export function skip(what, why) {
  skipped++;
  console.log(`  skipped ${what}: ${why}`);
}

const indent = (text) => text.replace(/^/gm, '          ');

/** Runs groups one after another; a group is a module's default export. */
export async function run(groups) {
  for (const [name, group] of groups) {
    console.log(name);
    try {
      await group();
    } catch (error) {
      failed++;
      console.log(`  FAILED  to set up\n${indent(error.stack)}`);
    }
    await clean_up();
  }
  console.log(`${passed} passed, ${failed} failed, ${skipped} skipped`);
  process.exit(failed ? 1 : 0);
}

for (const signal of ['SIGINT', 'SIGTERM']) {
  process.on(signal, async () => {
    await clean_up();
    process.exit(130);
  });
}

// An unhandled rejection counts as a failed test and does not end the run.
process.on('unhandledRejection', (error) => {
  failed++;
  console.log(`  FAILED  unhandled: ${error && error.stack}`);
});

// ------------------------------------------------------------------- helpers

/** Polls until the condition holds; gives its value. */
export async function until(what, condition, deadline = 15000) {
  const end = Date.now() + deadline;
  for (;;) {
    const answer = await condition();
    if (answer) { return answer; }
    if (Date.now() > end) { throw new Error(`timed out waiting until: ${what}`); }
    await pause(10);
  }
}

/** A temporary directory, removed at the end of the group. */
export function scratch() {
  const made = fs.mkdtempSync(path.join(os.tmpdir(), 'warmproxy-apps-'));
  defer(() => fs.rmSync(made, { recursive : true, force : true }));
  return made;
}

export async function free_port() {
  const server = net.createServer();
  await new Promise((done) => server.listen(0, '127.0.0.1', done));
  const { port } = server.address();
  await new Promise((done) => server.close(done));
  return port;
}

export function answers(port) {
  return new Promise((done) => {
    const socket = net.connect(port, '127.0.0.1');
    socket.on('connect', () => { socket.destroy(); done(true); });
    socket.on('error', () => done(false));
  });
}

export const sha256 = (bytes) =>
    createHash('sha256').update(bytes).digest('hex');

/** Reproducible pseudo-random bytes. */
export function noise(length, seed = 1) {
  const bytes = Buffer.alloc(length);
  let state = seed >>> 0 || 1;
  for (let i = 0; i + 4 <= length; i += 4) {
    state ^= state << 13;
    state >>>= 0;
    state ^= state >>> 17;
    state ^= state << 5;
    state >>>= 0;
    bytes.writeUInt32LE(state, i);
  }
  return bytes;
}

/** Runs a program and waits for it; throws unless it exits with 0. */
export function command(program, args, options = {}) {
  const done = spawnSync(program, args, {
    encoding : 'utf8',
    maxBuffer : 1 << 28,
    timeout : 120000,
    ...options
  });
  if (done.error) { throw done.error; }
  if (done.status !== 0 && !options.any_status) {
    throw new Error(`${program} ${args.join(' ')}\nended with ${
        done.status ?? done.signal}\n${done.stdout}${done.stderr}`);
  }
  return done;
}

/** The same without blocking the event loop; does not check the status. */
export function command_async(program, args, options = {}) {
  return new Promise((done, fail) => {
    const child = spawn(program, args, { timeout : 120000, ...options });
    let stdout = '', stderr = '';
    child.stdout.on('data', (data) => stdout += data);
    child.stderr.on('data', (data) => stderr += data);
    child.on('error', fail);
    child.on('close', (status) => done({ status, stdout, stderr }));
  });
}

// ------------------------------------------------------------------ warmproxy

const quoted = (word) => `'${word.replaceAll('\'', '\'\\\'\'')}'`;

/**
 * Starts build/warmproxy on a free port, with a target on another free port
 * that tests may also send requests to directly.
 *   target    { binary, args, env, cwd }; `env` may be a function of the port
 *   settings  { idle_stop : '500ms', ... } as WARMPROXY_IDLE_STOP and so on
 */
export async function start(target, settings = {}) {
  const port = await free_port();
  const target_port = await free_port();
  const env = {
    PATH : process.env.PATH,
    HOME : scratch(),
    HOST : '127.0.0.1',
    PORT : String(port),
    WARMPROXY_BINARY : target.binary,
    WARMPROXY_ARGS : (target.args || []).map(quoted).join(' '),
    WARMPROXY_TARGET_PORT : String(target_port),
    WARMPROXY_STATUS_PATH : '/-/warmproxy',
    ...(typeof target.env === 'function' ? target.env(target_port) : target.env)
  };
  for (const [name, value] of Object.entries(settings)) {
    env[`WARMPROXY_${name.toUpperCase()}`] = String(value);
  }
  const child = spawn(proxy_binary, [], {
    cwd : target.cwd,
    env,
    stdio : [ 'ignore', 'pipe', 'pipe' ]
  });
  const warm = { port, target_port, pid : child.pid, output : '' };
  child.stdout.on('data', (data) => warm.output += data);
  child.stderr.on('data', (data) => warm.output += data);
  const ended = new Promise((done, fail) => {
    child.on('exit', (code, signal) => done(signal || code));
    child.on('error', fail);
  });
  let end;
  ended.then((how) => end = how, (error) => end = error);
  warm.stop = async () => {
    child.kill('SIGTERM');
    const killer = setTimeout(() => child.kill('SIGKILL'), 20000);
    await ended;
    clearTimeout(killer);
    assert.equal(end, 0, `warmproxy ended with ${end}:\n${warm.output}`);
    assert.equal(await answers(target_port), false,
                 'the target outlived warmproxy');
  };
  warm.status = async () => JSON.parse(
      (await ask(port, { path : env.WARMPROXY_STATUS_PATH })).body);
  warm.memory_kb = () => Number(
      /VmRSS:\s+(\d+)/.exec(fs.readFileSync(`/proc/${child.pid}/status`))[1]);
  defer(() => end === undefined ? warm.stop() : undefined);
  await until('warmproxy listens', async () => {
    if (end !== undefined) {
      throw new Error(`warmproxy ended with ${end}:\n${warm.output}`);
    }
    return answers(port);
  });
  return warm;
}

// ------------------------------------------------------------------- requests

class Answer {
  constructor(message) {
    this.status = message.statusCode;
    this.reason = message.statusMessage;
    this.version = message.httpVersion;
    this.headers = pairs(message.rawHeaders);
    this.trailers = [];
    this.interim = [];
    this.body = null;
  }
  all(name) {
    return this.headers
        .filter(([ other ]) => other.toLowerCase() === name.toLowerCase())
        .map(([, value ]) => value);
  }
  header(name) { return this.all(name)[0]; }
  get text() { return this.body.toString('utf8'); }
  get json() { return JSON.parse(this.text); }
}

function pairs(raw) {
  const found = [];
  for (let i = 0; i < raw.length; i += 2) {
    found.push([ raw[i], raw[i + 1] ]);
  }
  return found;
}

/**
 * One request on a connection of its own.
 *   { method, path, headers : [[name, value], ...], body }
 * A Buffer or a string is sent with Content-Length, any other iterable chunked.
 * With `digest` the response body is hashed and not kept. With `stream` the
 * promise resolves as soon as the response head has arrived.
 */
export function ask(port, request = {}) {
  const given = request.headers || [];
  const has = (name) =>
      given.some(([ other ]) => other.toLowerCase() === name);
  // The same Host for direct and proxied requests: targets derive URLs from it.
  const headers = has('host') ? [] : [ [ 'Host', 'warm.test' ] ];
  headers.push(...given);
  let { body } = request;
  if (typeof body === 'string') { body = Buffer.from(body); }
  if (Buffer.isBuffer(body) && !has('content-length')) {
    headers.push([ 'Content-Length', String(body.length) ]);
  }
  const agent = new http.Agent({ keepAlive : true });
  return new Promise((done, fail) => {
    const interim = [];
    const call = http.request({
      agent,
      host : '127.0.0.1',
      port,
      method : request.method || 'GET',
      path : request.path || '/',
      headers : headers.flat()
    });
    const quit = (error) => {
      agent.destroy();
      fail(error);
    };
    const timer = setTimeout(
        () => call.destroy(new Error(`no answer to ${request.method || 'GET'} ${
            request.path || '/'}`)),
        request.deadline || 45000);
    call.on('error', quit);
    call.on('close', () => clearTimeout(timer));
    call.on('information', (message) => interim.push([
      message.statusCode, pairs(message.rawHeaders)
    ]));
    call.on('continue', () => request.on_continue?.(call));
    call.on('response', async (message) => {
      const answer = new Answer(message);
      answer.interim = interim;
      answer.message = message;
      answer.call = call;
      if (request.stream) { return done(answer); }
      try {
        const digest = request.digest && createHash('sha256');
        const parts = [];
        let length = 0;
        for await (const part of message) {
          length += part.length;
          digest ? digest.update(part) : parts.push(part);
        }
        answer.body = digest
            ? Buffer.from(`${length} bytes, sha256 ${digest.digest('hex')}`)
            : Buffer.concat(parts);
        answer.trailers = pairs(message.rawTrailers);
        agent.destroy();
        done(answer);
      } catch (error) { quit(error); }
    });
    if (body === undefined || Buffer.isBuffer(body)) {
      if (!request.on_continue) { call.end(body); }
    } else {
      (async () => {
        for await (const part of body) {
          if (!call.write(part)) {
            await new Promise((go) => call.once('drain', go));
          }
        }
        call.end();
      })().catch(quit);
    }
  });
}

// Hop-by-hop headers may differ, and Date does.
function comparable(answer, change) {
  const headers = answer.headers
      .filter(([ name ]) => !/^(connection|keep-alive)$/i.test(name))
      .map(([ name, value ]) => [ name, /^date$/i.test(name) ? '*' : value ]);
  const seen = {
    status : answer.status,
    reason : answer.reason,
    version : answer.version,
    interim : answer.interim,
    headers,
    trailers : answer.trailers,
    body : answer.body.toString('latin1')
  };
  return change ? change(seen) || seen : seen;
}

/**
 * Sends a request directly and through warmproxy, asserts that the responses
 * are equal and returns the proxied one. `change` may remove what differs
 * between two responses of the target itself.
 */
export async function same(warm, request, change) {
  const make = typeof request === 'function' ? request : () => request;
  const through = await ask(warm.port, make('through')); // starts it
  const direct = await ask(warm.target_port, make('direct'));
  const expected = comparable(direct, change);
  const seen = comparable(through, change);
  const bodies = [ seen.body, expected.body ];
  delete seen.body;
  delete expected.body;
  assert.deepEqual(seen, expected);
  if (bodies[0] !== bodies[1]) {
    if (bodies[0].length + bodies[1].length < 4000) {
      assert.equal(bodies[0], bodies[1]);
    }
    assert.fail(`bodies differ: ${bodies[0].length} bytes (${
        sha256(bodies[0])}) for ${bodies[1].length} (${sha256(bodies[1])})`);
  }
  return through;
}

// ------------------------------------------------------------------- browser

let chromium;

/** A headless Chromium, shared within the group and closed at its end. */
export async function browser() {
  if (!chromium) {
    chromium = await npm('playwright-core').chromium.launch({
      executablePath : process.env.APPS_CHROMIUM || '/usr/bin/chromium',
      args : [
        '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
        '--disable-background-networking', '--disable-component-update',
        '--disable-sync'
      ]
    });
    defer(async () => {
      const old = chromium;
      chromium = undefined;
      await old.close();
    });
  }
  return chromium;
}

/** A page in a context of its own: { locale, colorScheme, viewport, ... } */
export async function page(options = {}) {
  const context = await (await browser()).newContext(
      { locale : 'en-US', ...options });
  context.setDefaultTimeout(30000);
  const made = await context.newPage();
  made.trouble = [];
  made.on('pageerror', (error) => made.trouble.push(String(error)));
  return made;
}

export { assert, fs, net, path, pause, spawn };
