#!/usr/bin/env bash
# Development container of llm-serve: scripts/docker-dev.sh start|stop|shell|logs|test|clean
#
#   start           build it and serve artifacts/ on http://127.0.0.1:8000; a change of the sources restarts the server
#   stop            stop it
#   shell           open a shell in it
#   logs            follow its log
#   test [ARGS]     run pytest in it
#   clean           remove the container, its image and volumes
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
service=development
compose=(docker compose -f deploy/compose.yaml --profile "$service")

usage() {
    sed -n '2,9s/^# \{0,1\}//p' scripts/docker-dev.sh
}

case "${1:-}" in
    start)
        "${compose[@]}" up --build --detach "$service"
        echo "llm-serve: http://127.0.0.1:8000"
        ;;
    stop) "${compose[@]}" stop "$service" ;;
    shell) "${compose[@]}" exec "$service" bash ;;
    logs) "${compose[@]}" logs --follow "$service" ;;
    test) "${compose[@]}" run --rm --no-deps "$service" python -m pytest "${@:2}" ;;
    clean) "${compose[@]}" down --volumes --rmi local ;;
    -h | --help) usage ;;
    *)
        usage >&2
        exit 2
        ;;
esac
