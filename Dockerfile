# An image that is installed from wheels alone, for machines without internet: docs/semeval.md has the commands.
#
# The first stage needs a network; torch's wheels for Linux bring CUDA along.
FROM python:3.12-slim AS wheels
WORKDIR /build
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY lm_eval_steering ./lm_eval_steering
COPY tasks ./tasks
COPY neuron_sets ./neuron_sets
RUN pip wheel --no-cache-dir --wheel-dir /wheels --constraint constraints.txt ".[report,slurm,words]"

FROM python:3.12-slim
RUN --mount=type=bind,from=wheels,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-index --find-links /wheels "lm-eval-steering[report,slurm,words]"
# What the user carries in: the hub's cache, rows of the tasks.
ENV HF_HOME=/carry/huggingface \
    STEERING_DATA=/carry/rows \
    HF_HUB_OFFLINE=1 \
    HF_DATASETS_OFFLINE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /runs
ENTRYPOINT ["lm-eval-steering"]
