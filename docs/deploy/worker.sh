#!/bin/sh
# Bring a checkout up to date, then work in it:
#
#     worker.sh gpu       a worker on the pool `gpu`, with a concurrency limit of its own; one retraining at a time
#     worker.sh control   a worker on the pool `control` (nightly, monitor)
#     worker.sh setup     pools, limits, deployments and automations (`python -m flows.setup`), once for all workers
#     worker.sh checkout  nothing more (for the init container of a kubernetes work pool)
#
# Further arguments go to `prefect worker start`. Tried by hand against a real server: docs/deploy/README.md.
#
# PREFECT_API_URL        the Prefect server, http://host:4200/api
# MLFLOW_TRACKING_URI    the MLflow server, http://host:5000
# FLAWSMITH_CHECKOUT     folder of the checkout, of this worker alone
# FLAWSMITH_REPOSITORY   git address to clone from; empty: the checkout is somebody else's care
# FLAWSMITH_REVISION     branch, tag or commit to work on (default: the remote's HEAD)
# FLAWSMITH_DVC_REMOTE   DVC remote shared by all workers, e.g. s3://bucket/dvc; empty: as the repository configures it
# FLAWSMITH_DVC_ENDPOINT address of an S3-like store that is not AWS; empty: AWS
# FLAWSMITH_DVC_CACHE    DVC cache shared by the workers of one machine; empty: inside the checkout
# FLAWSMITH_GPU          concurrency limit of this worker's GPU, a name that no other GPU has

set -eu

case "${1:-}" in
gpu) : "${FLAWSMITH_GPU:?is not set; give its GPU a name that no other has}" ;;
control | setup | checkout) ;;
*) echo "worker.sh: say what to be: gpu, control, setup or checkout" >&2 && exit 2 ;;
esac
role=$1
shift
: "${FLAWSMITH_CHECKOUT:?is not set; name the folder of its checkout}"

if [ -n "${FLAWSMITH_REPOSITORY:-}" ]; then
    if [ ! -d "$FLAWSMITH_CHECKOUT/.git" ]; then
        git clone --no-checkout "$FLAWSMITH_REPOSITORY" "$FLAWSMITH_CHECKOUT"
    fi
    cd "$FLAWSMITH_CHECKOUT"
    git fetch --force --tags origin "${FLAWSMITH_REVISION:-HEAD}"
    # Only a new revision replaces what the last retraining left in dvc.lock: DVC finds those results in its run cache.
    if [ "$(git rev-parse --verify --quiet HEAD)" != "$(git rev-parse FETCH_HEAD^{commit})" ] || [ ! -f dvc.yaml ]; then
        git checkout --force --detach FETCH_HEAD
    fi
fi
cd "$FLAWSMITH_CHECKOUT"
if [ -n "${FLAWSMITH_DVC_CACHE:-}" ]; then
    dvc cache dir --local "$FLAWSMITH_DVC_CACHE"
    dvc config --local cache.shared group
fi
if [ -n "${FLAWSMITH_DVC_REMOTE:-}" ]; then
    dvc remote add --local --default --force shared "$FLAWSMITH_DVC_REMOTE"
    if [ -n "${FLAWSMITH_DVC_ENDPOINT:-}" ]; then
        dvc remote modify --local shared endpointurl "$FLAWSMITH_DVC_ENDPOINT"
    fi
fi

export PYTHONPATH="$FLAWSMITH_CHECKOUT/src${PYTHONPATH:+:$PYTHONPATH}" # the checkout's code, not the image's

case "$role" in
checkout) exit 0 ;;
setup) exec python -m flows.setup "$@" ;;
gpu)
    prefect gcl inspect "$FLAWSMITH_GPU" >/dev/null 2>&1 || prefect gcl create "$FLAWSMITH_GPU" --limit 1
    set -- --name "$FLAWSMITH_GPU" --limit 1 "$@"
    ;;
control) set -- --name "control-$(hostname)" "$@" ;;
esac
exec prefect worker start --pool "$role" --type process --no-create-pool-if-not-found --install-policy never "$@"
