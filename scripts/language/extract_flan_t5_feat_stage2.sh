#!/usr/bin/env bash
source "$(dirname "$0")/../launch.sh"
launch language/extract_t5_feature.py "$@"
