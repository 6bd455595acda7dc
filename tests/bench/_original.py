"""The script that the idea began as: a stand-in with FastAPI and httpx.

Written for the benchmark after the published script, which it behaves like: a
request that finds a start under way is forwarded at once, the readiness probe
runs every 1.5 s, bodies are held in memory in both directions, every request
makes a client and a connection of its own, and nobody reads the pipe that the
target writes its output to.

BINARY is the target, TARGET_PORT its port, PORT the one that this listens on.
"""

import asyncio
import os
import subprocess

import httpx
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware

TARGET_PORT = os.environ["TARGET_PORT"]
TARGET = f"http://127.0.0.1:{TARGET_PORT}"
MONTH = 30 * 24 * 60 * 60

app = FastAPI(docs_url=None, redoc_url=None)
app.add_middleware(
    CORSMiddleware,
    allow_origins=["*"],
    allow_credentials=True,
    allow_methods=["*"],
    allow_headers=["*"],
)
starting = asyncio.Lock()
child = None


async def answers():
    try:
        async with httpx.AsyncClient(timeout=1.0) as client:
            return (await client.get(TARGET)).status_code in range(200, 400)
    except httpx.HTTPError:
        return False


async def start():
    global child
    if starting.locked():
        return
    async with starting:
        if await answers():
            return
        if child is None or child.poll() is not None:
            child = subprocess.Popen(
                [os.environ["BINARY"]],
                env={**os.environ, "PORT": TARGET_PORT},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        for _ in range(30):
            if await answers():
                return
            await asyncio.sleep(1.5)
        raise RuntimeError("the target does not answer")


@app.api_route(
    "/{path:path}",
    methods=["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"],
)
async def forward(path: str, request: Request):
    await start()
    headers = {k: v for k, v in request.headers.items() if k != "host"}
    async with httpx.AsyncClient(timeout=None) as client:
        answer = await client.request(
            request.method,
            f"{TARGET}/{path}",
            headers=headers,
            content=await request.body(),
            params=request.query_params,
        )
    headers = dict(answer.headers)
    kind = headers.get("content-type", "")
    if path.endswith((".js", ".css")) or kind.startswith(
        ("text/javascript", "text/css")
    ):
        headers["Cache-Control"] = f"public, s-maxage={MONTH}"
        headers["CDN-Cache-Control"] = f"public, max-age={MONTH}"
        headers["Vercel-CDN-Cache-Control"] = f"public, max-age={MONTH}"
    return Response(answer.content, answer.status_code, headers)


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(os.environ["PORT"]),
                log_level="warning")
