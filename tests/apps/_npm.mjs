// An Express application, and WebSockets with the package ws on both sides.

import { gzipSync } from 'node:zlib';
import {
  ask, assert, build, command_async, fs, here, net, noise, npm, path, same,
  scratch, sha256, start, test, until
} from './_support.mjs';
import { all_kinds, half_open, large, same_talk } from './_sockets.mjs';

const form_type = [ 'Content-Type', 'application/x-www-form-urlencoded' ];

// The headers that warmproxy sets.
const forwarded = /^x-forwarded-/i;

function seen(answer) {
  const what = answer.json;
  const headers = [];
  for (let i = 0; i < what.headers.length; i += 2) {
    headers.push([ what.headers[i], what.headers[i + 1] ]);
  }
  what.headers = headers;
  return what;
}

export default async function() {
  const files = scratch();
  fs.writeFileSync(path.join(files, 'photo.jpg'), noise(3000000));
  const warm = await start({
    binary : process.execPath,
    args : [ path.join(here, '_target.mjs') ],
    env : { APPS_BUILD : build, FILES : files }
  });
  const { port, target_port } = warm;

  await test('express: a form as the first request', async () => {
    const cold = await ask(port, {
      method : 'POST',
      path : '/login',
      headers : [ form_type ],
      body : 'name=early+bird'
    });
    assert.equal(cold.status, 303);
    const cookie = cold.header('Set-Cookie').split(';')[0];
    const me = await same(
        warm, { path : '/me', headers : [ [ 'Cookie', cookie ] ] });
    assert.deepEqual(me.json, { name : 'early bird' });
    assert.equal((await same(warm, { path : '/me' })).status, 401);
  });

  await test('express: requests are forwarded unchanged', async () => {
    for (const request of [
      { path : '/seen/%2F%FF//./../x;y?a=+&b=%20&?' },
      { path : '/seen?' },
      { method : 'POST', path : '/seen', body : noise(100000) },
      { method : 'POST', path : '/seen', body : '' },
      { method : 'GET', path : '/seen', body : 'on a GET' },
      { method : 'DELETE', path : '/seen', body : 'on a DELETE' },
      { method : 'REPORT', path : '/seen', body : '<r/>' },
      { method : 'PROPFIND', path : '/seen' },
      {
        method : 'POST',
        path : '/seen',
        headers : [ [ 'Content-Encoding', 'gzip' ] ],
        body : gzipSync('packed')
      },
      {
        path : `/seen/${'p'.repeat(4000)}`,
        headers : [
          [ 'x-lower', '1' ], [ 'X-UPPER', '2' ], [ 'X-Twice', 'a' ],
          [ 'Cookie', 'a=%20b; c="%0D%0A"' ], [ 'X-Twice', 'b' ],
          [ 'X-Latin', 'caf\xe9' ], [ 'X-Long', 'v'.repeat(8000) ],
          [ 'X-Empty', '' ], [ 'Accept', 'a/b;q=0.5,\t*/*' ]
        ]
      }
    ]) {
      const through = seen(await ask(port, request));
      const direct = seen(await ask(target_port, request));
      const told = through.headers.filter(([ name ]) => forwarded.test(name));
      for (const each of [ direct, through ]) {
        each.headers = each.headers.filter(
            ([ name ]) => !forwarded.test(name) && !/^connection$/i.test(name));
      }
      assert.deepEqual(through, direct);
      assert.deepEqual(
          new Map(told.map(([ name, value ]) => [ name.toLowerCase(), value ])),
          new Map([ [ 'x-forwarded-for', '127.0.0.1' ],
                    [ 'x-forwarded-proto', 'http' ],
                    [ 'x-forwarded-host', 'warm.test' ] ]));
      assert.equal(told.length, 3);
    }
  });

  await test('express: chunked request with trailers', async () => {
    const talk = (port) => new Promise((done, fail) => {
      const socket = net.connect(port, '127.0.0.1');
      let got = '';
      socket.on('data', (data) => got += data);
      socket.on('error', fail);
      socket.on('close', () => done(JSON.parse(/\{.*\}/.exec(got)[0])));
      socket.write('POST /seen HTTP/1.1\r\nHost: warm.test\r\n'
                   + 'Connection: close\r\nTransfer-Encoding: chunked\r\n'
                   + 'Trailer: X-Sum\r\n\r\n3;note="a"\r\nabc\r\n'
                   + '00A\r\n0123456789\r\n0\r\nX-Sum: 13\r\n\r\n');
    });
    const through = await talk(port);
    const direct = await talk(target_port);
    assert.equal(through.length, 13);
    for (const what of ['length', 'sha256', 'trailers', 'method', 'url']) {
      assert.deepEqual(through[what], direct[what]);
    }
    assert.deepEqual(through.trailers, [ 'X-Sum', '13' ]);
  });

  await test('express: the client address a framework sees', async () => {
    assert.deepEqual((await ask(port, { path : '/believed' })).json, {
      ip : '127.0.0.1',
      ips : [ '127.0.0.1' ],
      protocol : 'http',
      host : 'warm.test'
    });
  });

  await test('express: responses are forwarded unchanged', async () => {
    const page = await same(warm, { path : '/' });
    assert.equal(
        (await same(warm, {
          path : '/',
          headers : [ [ 'If-None-Match', page.header('ETag') ] ]
        })).status, 304);
    await same(warm, { method : 'HEAD', path : '/' });
    await same(warm, { method : 'OPTIONS', path : '/' });
    assert.equal((await same(warm, { path : '/nowhere' })).status, 404);
    assert.equal((await same(warm, { path : '/cookies' })).all('Set-Cookie').length, 4);
    await same(warm, { path : '/odd' });
    for (const query of ['?status=204', '?status=304', '?status=500',
                         '?status=299&reason=Odd%20One', '?status=404']) {
      await same(warm, { path : `/bare${query}` });
    }
    const trailers = await same(warm, { path : '/trailers' });
    assert.equal(trailers.trailers.length, 1);
  });

  await test('express: interim responses', async () => {
    const early = await same(warm, { path : '/early' });
    assert.deepEqual(early.interim.map(([ status ]) => status), [ 103, 102 ]);
    assert.equal(early.text, 'late');
  });

  await test('express: Expect and 100 Continue', async () => {
    const body = noise(50000);
    const expecting = (...more) => () => ({
      method : 'POST',
      path : '/seen',
      headers : [ [ 'Expect', '100-continue' ],
                  [ 'Content-Length', String(body.length) ], ...more ],
      on_continue : (call) => call.end(body)
    });
    const answer = await same(warm, expecting(), (answer) => {
      answer.body = JSON.parse(answer.body).sha256;
      answer.headers = answer.headers.filter(
          ([ name ]) => !/^(content-length|etag)$/i.test(name));
    });
    assert.equal(answer.json.sha256, sha256(body));
    const refused = await same(warm, expecting([ 'X-Refuse', '1' ]));
    assert.equal(refused.status, 417);
  });

  await test('express: content codings', async () => {
    for (const coding of ['gzip', 'deflate', 'br', 'identity']) {
      const answer = await same(warm, {
        path : '/packed',
        headers : [ [ 'Accept-Encoding', coding ] ]
      });
      assert.equal(answer.header('Content-Encoding'),
                   coding === 'identity' ? undefined : coding);
    }
    const body = gzipSync(JSON.stringify({ list : Array(9999).fill('x') }));
    const answer = await same(warm, {
      method : 'POST',
      path : '/json',
      headers : [ [ 'Content-Type', 'application/json' ],
                  [ 'Content-Encoding', 'gzip' ] ],
      body
    });
    assert.equal(answer.json.list.length, 9999);
    await same(warm, {
      method : 'POST',
      path : '/json',
      headers : [ [ 'Content-Type', 'application/json' ] ],
      body : '{"broken'
    });
  });

  await test('express: uploads by fetch and curl', async () => {
    const file = noise(30000000, 5);
    const form = new FormData();
    form.set('title', 'ü & %41');
    form.set('empty', '');
    form.set('file', new Blob([ file ], { type : 'image/x-test' }), 'a "b".bin');
    form.set('small', new Blob([ 'x' ]), 'small');
    const told = await (await fetch(`http://127.0.0.1:${port}/upload`, {
      method : 'POST',
      body : form
    })).json();
    assert.deepEqual({...told.fields }, { title : 'ü & %41', empty : '' });
    assert.equal(told.files[0].size, file.length);
    assert.equal(told.files[0].sha256, sha256(file));
    assert.equal(told.files[0].type, 'image/x-test');
    const photo = path.join(files, 'photo.jpg');
    for (const coding of ['Expect: 100-continue', 'Transfer-Encoding: chunked']) {
      const done = await command_async('curl', [
        '-sS', '-H', coding, '-F', 'title=by curl', '-F', `file=@${photo}`,
        `http://127.0.0.1:${port}/upload`
      ]);
      assert.equal(JSON.parse(done.stdout || done.stderr).files[0].sha256,
                   sha256(fs.readFileSync(photo)));
    }
  });

  await test('express: response streamed during the upload', async () => {
    let more;
    const answer = await ask(port, {
      method : 'POST',
      path : '/duplex',
      stream : true,
      body : (async function*() {
        yield 'one';
        for (const part of ['two', 'three']) {
          await new Promise((go) => more = go);
          yield part;
        }
      })()
    });
    let text = '';
    answer.message.on('data', (data) => text += data);
    for (const part of ['one', 'two', 'three']) {
      await until(`the echo of ${part}`,
                  () => text.includes(`got ${part}\n`) && (more || part === 'three'));
      const go = more;
      more = undefined;
      go?.();
    }
    await until('the end', () => text.endsWith('all\n'));
  });

  await test('express: early response to an upload', async () => {
    const done = await command_async('sh', [
      '-c', 'head -c 20000000 /dev/zero | '
          + 'curl -sS -w " %{http_code}" --data-binary @- -H Expect: "$1"',
      'sh', `http://127.0.0.1:${port}/refused`
    ]);
    assert.equal(done.stdout, 'too much 413', done.stderr);
  });

  await test('express: events are not buffered', async () => {
    const record = async (port, name) => {
      const answer = await ask(port, { path : `/events?name=${name}`, stream : true });
      assert.equal(answer.header('Content-Type'), 'text/event-stream; charset=utf-8');
      let text = '';
      let ended = false;
      answer.message.on('data', (data) => text += data);
      answer.message.on('end', () => ended = true);
      await until('the first event', () => text.endsWith('\n\n'));
      assert.equal(text, 'id: 1\ndata: first\n\n');
      await ask(port, { path : `/release?name=${name}` });
      await until('the end', () => ended);
      return text;
    };
    assert.equal(await record(port, 'a'), await record(target_port, 'b'));
  });

  await test('express: a disconnect ends the event stream at the target', async () => {
    const answer = await ask(port, { path : '/events?name=left', stream : true });
    const waiting = async () =>
        (await ask(target_port, { path : '/waiting' })).json;
    assert.deepEqual(await waiting(), [ 'left' ]);
    answer.call.destroy();
    await until('the target knows', async () => (await waiting()).length === 0);
  });

  await test('express: a truncated response stays truncated', async () => {
    for (const each of [ target_port, port ]) {
      await assert.rejects(ask(each, { path : '/cut' }), /aborted|ECONNRESET|hang up/);
    }
  });

  await test('express: files and ranges', async () => {
    await same(warm, { path : '/files/photo.jpg' });
    await same(warm, {
      path : '/files/photo.jpg',
      headers : [ [ 'Range', 'bytes=1000000-2000000' ] ]
    });
    await same(warm, {
      path : '/files/photo.jpg',
      headers : [ [ 'Range', 'bytes=0-1,5-6' ] ]
    });
    await same(warm, { path : '/files/../_target.mjs' });
  });

  await test('websocket: every kind of message', async () => {
    const record = await same_talk(warm, '/socket', all_kinds);
    assert.deepEqual(record.at(-1), [ 'close', 4321, 'enough' ]);
    assert.equal(record.length, 8);
  });

  await test('websocket: permessage-deflate', async () => {
    const record = await same_talk(warm, '/socket', all_kinds,
                                   { perMessageDeflate : { threshold : 0 } });
    assert.match(record[0][2]['sec-websocket-extensions'], /permessage-deflate/);
    await same_talk(warm, '/socket', large(3), { perMessageDeflate : true });
  });

  await test('websocket: one and sixteen messages of a megabyte', async () => {
    await same_talk(warm, '/socket', large(1));
    await same_talk(warm, '/socket', large(16));
  });

  await test('websocket: pings, subprotocols, close codes', async () => {
    const pings = await same_talk(
        warm, '/socket?ping', async (socket, { messages }) => {
          await messages(1);
          socket.close(1001, 'going');
        });
    assert.deepEqual(pings.slice(1, 3), [ [ 'ping', 'are you there' ],
                                          [ 'text', 'pong: are you there' ] ]);
    const chosen = await same_talk(warm, '/socket',
                                   (socket) => socket.close(1000),
                                   { protocols : [ 'first', 'second' ] });
    assert.equal(chosen[0][2]['sec-websocket-protocol'], 'second');
    for (const code of [ 1000, 1011, 3000, 4999 ]) {
      const ended = await same_talk(warm, `/socket?close=${code}`);
      assert.deepEqual(ended.at(-1), [ 'close', code, 'as asked' ]);
    }
    assert.equal((await same_talk(warm, '/socket?cut')).at(-1)[1], 1006);
    assert.equal((await same_talk(warm, '/socket',
                                  (socket) => socket.terminate())).at(-1)[1],
                 1006);
  });

  await test('websocket: a refused upgrade', async () => {
    const refused = await same_talk(warm, '/elsewhere');
    assert.equal(refused[0][1], 401);
    assert.deepEqual(refused[1], [ 'body', 'not today' ]);
  });

  await test('express: upgrade to another protocol with half-close', async () => {
    for (const length of [ 0, 5, 1 << 20 ]) {
      const bytes = noise(length);
      const direct = await half_open(target_port, '/until-end', bytes);
      const through = await half_open(port, '/until-end', bytes);
      assert.match(direct, new RegExp(`\\r\n\\r\nhello got ${length}$`));
      // Connection and Upgrade are written again for each hop, in any order.
      const lines = (answer) => answer.split('\r\n').sort();
      assert.deepEqual(lines(through), lines(direct));
    }
  });

  await test('express: no request is left in flight', async () => {
    await until('nothing is in flight',
                async () => (await warm.status()).in_flight === 0);
    const status = await warm.status();
    assert.equal(status.starts, 1);
    assert.equal(status.state, 'up');
  });
}
