// rclone: as a WebDAV server and as a WebDAV client.

import {
  ask, assert, command_async, fs, noise, path, same, scratch, sha256, start,
  test
} from './_support.mjs';

// Tokens and times differ in every response, and rclone lists properties in
// random order.
function without_chance(answer) {
  answer.body = answer.body.replace(/<D:href>\d{10,}/g, '<D:href>TOKEN')
                    .replace(/(<D:(getlastmodified|getetag)>)[^<]*/g, '$1')
                    .split(/(?<=>)(?=<)/).sort().join('\n');
  answer.headers = answer.headers.map(([ name, value ]) => [
    name, /^(lock-token|etag|last-modified)$/i.test(name) ? '*' : value
  ]);
}

export default async function() {
  const root = scratch();
  const warm = await start({
    binary : 'rclone',
    args : [ 'serve', 'webdav', root, '--addr', '127.0.0.1:{port}',
             '--dir-cache-time', '0s', '--poll-interval', '0' ]
  });

  // Direct and proxied requests use folders of their own, with names of equal
  // length.
  const folder = { direct : '/asked1', through : '/asked2' };
  const nameless = (answer) => {
    without_chance(answer);
    answer.body = answer.body.replace(/asked[12]/g, 'asked');
    for (const header of answer.headers) {
      header[1] = header[1].replace(/asked[12]/g, 'asked');
    }
  };
  const step = async (status, method, path, headers = [], body) => {
    const answer = await same(warm, (way) => ({
      method,
      path : folder[way] + path,
      headers : headers.map(([ name, value ]) => [
        name, value.replace('FOLDER', folder[way])
      ]),
      body
    }), nameless);
    assert.equal(answer.status, status, `${method} ${path}: ${answer.text}`);
    return answer;
  };
  const file = (way, name) =>
      fs.readFileSync(path.join(root, folder[way], name));

  await test('rclone: OPTIONS as the first request', async () => {
    const cold = await ask(warm.port, { method : 'OPTIONS' });
    assert.match(cold.header('Allow'), /PROPFIND/);
    await same(warm, { method : 'OPTIONS' });
  });

  await test('rclone: MKCOL, PUT, PROPFIND', async () => {
    await step(201, 'MKCOL', '');
    await step(409, 'MKCOL', '/no/parent');
    const body = noise(300000);
    await step(201, 'PUT', '/some%20file.bin', [], body);
    assert.equal(sha256(file('through', 'some file.bin')), sha256(body));
    await step(201, 'PUT', '/empty', [], '');
    const found = await step(207, 'PROPFIND', '/', [ [ 'Depth', '1' ] ]);
    assert.match(found.text, /some%20file\.bin/);
    await step(207, 'PROPFIND', '/some%20file.bin', [
      [ 'Depth', '0' ], [ 'Content-Type', 'application/xml' ]
    ], '<?xml version="1.0"?><propfind xmlns="DAV:"><prop><getcontentlength/>'
       + '</prop></propfind>');
    await step(400, 'PROPFIND', '/', [], '<not xml');
  });

  await test('rclone: chunked PUT', async () => {
    const parts = async function*() {
      for (let i = 0; i < 50; i++) { yield noise(1000 + i * 977, i + 1); }
    };
    const answer = await ask(warm.port, {
      method : 'PUT',
      path : `${folder.through}/chunked`,
      body : parts()
    });
    assert.equal(answer.status, 201);
    const sent = [];
    for await (const part of parts()) { sent.push(part); }
    assert.equal(sha256(file('through', 'chunked')),
                 sha256(Buffer.concat(sent)));
    await ask(warm.target_port, {
      method : 'PUT',
      path : `${folder.direct}/chunked`,
      body : parts()
    });
  });

  await test('rclone: PUT by curl from a pipe', async () => {
    const source = path.join(scratch(), 'source');
    fs.writeFileSync(source, noise(5000000, 7));
    const done = await command_async('sh', [
      '-c', 'cat "$1" | curl -sS -w "%{http_code}" -T - "$2"', 'sh', source,
      `http://127.0.0.1:${warm.port}${folder.through}/piped`
    ]);
    assert.match(done.stdout, /201$/, done.stderr);
    assert.equal(sha256(file('through', 'piped')),
                 sha256(fs.readFileSync(source)));
    fs.unlinkSync(path.join(root, folder.through, 'piped'));
  });

  await test('rclone: GET and ranges', async () => {
    await step(200, 'GET', '/some%20file.bin');
    await step(206, 'GET', '/some%20file.bin', [ [ 'Range', 'bytes=5-99' ] ]);
    await step(200, 'HEAD', '/some%20file.bin');
    await step(404, 'GET', '/nothing');
  });

  await test('rclone: COPY, MOVE', async () => {
    const to = (name, ...more) =>
        [ [ 'Destination', `http://warm.test${'FOLDER'}/${name}` ], ...more ];
    await step(201, 'COPY', '/some%20file.bin', to('copy'));
    await step(201, 'MOVE', '/copy', to('moved'));
    await step(412, 'COPY', '/moved', to('empty', [ 'Overwrite', 'F' ]));
    await step(204, 'COPY', '/moved', to('empty', [ 'Overwrite', 'T' ]));
    await step(404, 'COPY', '/copy', to('again'));
    assert.equal(sha256(file('through', 'moved')), sha256(noise(300000)));
    assert.equal(sha256(file('through', 'empty')), sha256(noise(300000)));
  });

  await test('rclone: LOCK, UNLOCK', async () => {
    const tokens = {};
    await same(warm, { path : `${folder.through}/moved` });
    for (const [way, port] of [[ 'direct', warm.target_port ],
                               [ 'through', warm.port ]]) {
      const answer = await ask(port, {
        method : 'LOCK',
        path : `${folder[way]}/moved`,
        headers : [ [ 'Timeout', 'Second-60' ], [ 'Depth', '0' ] ],
        body : '<?xml version="1.0"?><lockinfo xmlns="DAV:"><lockscope>'
            + '<exclusive/></lockscope><locktype><write/></locktype></lockinfo>'
      });
      assert.equal(answer.status, 200, answer.text);
      tokens[way] = answer.header('Lock-Token');
      assert.ok(tokens[way]);
    }
    await step(423, 'DELETE', '/moved');
    await same(warm, (way) => ({
      method : 'UNLOCK',
      path : `${folder[way]}/moved`,
      headers : [ [ 'Lock-Token', tokens[way] ] ]
    }), nameless);
    await step(204, 'DELETE', '/moved');
    assert.equal(fs.existsSync(path.join(root, folder.through, 'moved')),
                 false);
  });

  await test('rclone: both folders have the same content', async () => {
    const listing = await step(207, 'PROPFIND', '/', [ [ 'Depth', 'infinity' ] ]);
    assert.ok(listing.text.length > 500);
    await step(204, 'DELETE', '/');
  });

  await test('rclone: rclone sync as the client', async () => {
    const source = scratch();
    const tree = {
      'one.txt' : Buffer.from('one'),
      'deep/er/two.bin' : noise(2000000, 3),
      'deep/empty' : Buffer.alloc(0),
      'with space/ünï%41cödé.txt' : Buffer.from('names')
    };
    for (let i = 0; i < 40; i++) {
      tree[`many/${i}`] = noise(i * 1000, i + 9);
    }
    for (const [name, content] of Object.entries(tree)) {
      const file = path.join(source, name);
      fs.mkdirSync(path.dirname(file), { recursive : true });
      fs.writeFileSync(file, content);
    }
    const there = [
      ':webdav:synced', '--webdav-url', `http://127.0.0.1:${warm.port}/`,
      '--config', '/dev/null', '--transfers', '8'
    ];
    const rclone = async (...args) => {
      const done = await command_async('rclone', args);
      assert.equal(done.status, 0, done.stderr);
      return done.stdout;
    };
    await rclone('sync', source, ...there);
    for (const [name, content] of Object.entries(tree)) {
      assert.equal(sha256(fs.readFileSync(path.join(root, 'synced', name))),
                   sha256(content), name);
    }
    fs.rmSync(path.join(source, 'many'), { recursive : true });
    fs.renameSync(path.join(source, 'one.txt'), path.join(source, '1.txt'));
    await rclone('sync', source, ...there);
    await rclone('check', '--download', source, ...there);
    const left = (await rclone('lsf', '-R', '--files-only', ...there))
                     .trim().split('\n').sort();
    assert.deepEqual(left, [ '1.txt', 'deep/empty', 'deep/er/two.bin',
                             'with space/ünï%41cödé.txt' ].sort());
  });
}
