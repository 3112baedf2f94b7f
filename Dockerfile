# The server of Stepstate, with the models of models/. `docker compose up` starts it with TLS, a
# token, Prometheus and Grafana. Alone, without either, and with its port on loopback:
# `docker run --rm -p 127.0.0.1:50051:50051 -e STEPSTATE_INSECURE=true -v stepstate:/var/lib/stepstate stepstate`.
ARG PYTHON_IMAGE=python:3.11-slim

FROM ${PYTHON_IMAGE} AS build
# Where torch's CPU wheels are: PyPI's own bring gigabytes of CUDA libraries.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# Without pip inside: the image runs what was installed here and installs nothing more.
RUN python3 -m venv --without-pip /opt/stepstate
WORKDIR /build
COPY constraints.txt ./
# torch first and alone: this layer, nine tenths of the image, is kept when only code changes.
RUN python3 -m pip --python /opt/stepstate/bin/python3 install --no-cache-dir \
        --constraint constraints.txt --extra-index-url "${TORCH_INDEX}" torch
COPY pyproject.toml README.md LICENSE ./
COPY service service
# What the link in service/stepstate/examples points to.
COPY models/electricity/2 models/electricity/2
RUN python3 -m pip --python /opt/stepstate/bin/python3 install --no-cache-dir \
        --constraint constraints.txt --extra-index-url "${TORCH_INDEX}" ".[server,triton]"
COPY models /app/models
# Readable by any user, whatever the umask of the checkout.
RUN chmod -R a+rX /app

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="stepstate" \
      org.opencontainers.image.description="Steps trained recurrent networks, session by session" \
      org.opencontainers.image.licenses="Apache-2.0"
# By number below, so that Kubernetes can see that it is not root (runAsNonRoot).
RUN useradd --system --uid 10001 --user-group --no-create-home --home-dir /app \
        --shell /usr/sbin/nologin stepstate
# Where sessions are kept. An empty volume mounted here takes this owner; a folder of the host's
# has to belong to 10001 already (Kubernetes: fsGroup: 10001).
RUN install --directory --owner=10001 --group=10001 --mode=700 /var/lib/stepstate
# Where certificates and tokens are mounted. It only reads them: as 10001, or by their group.
RUN install --directory --owner=10001 --group=10001 --mode=755 /etc/stepstate
COPY --from=build /opt/stepstate /opt/stepstate
COPY --from=build /app /app
# Inside a container the address must not be loopback. So the server starts only with TLS and
# identities (STEPSTATE_CONFIG, or STEPSTATE_TLS_CERT, STEPSTATE_TLS_KEY, STEPSTATE_TOKENS_FILE ...),
# or with STEPSTATE_INSECURE=true. What is on the metrics port is of no session; publish it with care.
ENV PATH=/opt/stepstate/bin:$PATH \
    STEPSTATE_LISTEN=0.0.0.0:50051 \
    STEPSTATE_METRICS_LISTEN=0.0.0.0:9464 \
    STEPSTATE_MODELS=/app/models \
    STEPSTATE_STORE=sqlite:/var/lib/stepstate/sessions.db
WORKDIR /app
USER 10001:10001
# The only place that it writes to: the rest may be read-only. Name the volume, and sessions outlive
# the container.
VOLUME /var/lib/stepstate
EXPOSE 50051 9464
# The first signal drains and saves every session, within STEPSTATE_DRAIN_SECONDS (30): grant more
# before SIGKILL (`docker stop -t 40`, stop_grace_period, terminationGracePeriodSeconds).
STOPSIGNAL SIGTERM
# Asks grpc.health.v1 at STEPSTATE_TARGET, by default 127.0.0.1:50051; with TLS set it, for example
# to grpcs://localhost:50051, and STEPSTATE_CA_FILE. It needs no token.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["stepstate", "health"]
ENTRYPOINT ["stepstate"]
CMD ["serve"]
