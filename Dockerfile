# The server of deploy/serve.py and what it imports; see docs/serving.md.
#   docker build -t archcompare-serve .
#   docker run --stop-timeout=60 -v "$PWD/exports:/models:ro" -v "$PWD/keys:/keys:ro" -v answers:/data -p 8000:8000 \
#     archcompare-serve /models/cnn --keys_file=/keys --log=/data/answers.sqlite
FROM python:3.12-slim

ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1
WORKDIR /app
COPY pyproject.toml constraints.txt ./
RUN touch README.md && pip install -c constraints.txt '.[onnx,serve]'
COPY LICENSE errors.py input_pipeline.py ./
COPY analysis analysis
COPY configs configs
COPY data data
COPY deploy deploy
COPY experiment experiment
COPY models models
COPY training training

RUN useradd --system --uid 10001 --no-create-home --home-dir /nonexistent serve && mkdir /models /data && chown serve /data
USER 10001
ENV JAX_PLATFORMS=cpu MPLCONFIGDIR=/tmp ARCHCOMPARE_HOST=0.0.0.0 ARCHCOMPARE_PORT=8000
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s CMD ["python", "-c", "import http.client as h, os, sys; c = h.HTTPConnection('127.0.0.1', int(os.environ['ARCHCOMPARE_PORT']), timeout=4); c.request('GET', '/healthz'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["python", "-m", "deploy.serve"]
