#!/usr/bin/env sh
# A two-head detector from float to the files of the tool chain. Run it in this folder: sh run.sh
# Further overrides go to the commands that take the task: sh run.sh +debug=tiny
set -e
common="+experiment=int8_int16 task=detector"

echo "1. Does the model fuse, and is the qconfig in force?"
python -m qflow.check $common "$@"

echo "2. Where would int8 lose accuracy?"
python -m qflow.analyze $common "$@"

echo "3. Which mix is the fastest that loses at most 0.3 points? (Exit code 1 means that none was found.)"
python -m qflow.tune $common objective.max_drop=0.003 "$@"

echo "4. Rebuild the best trial from its run, judge it, and register it."
python -m qflow.promote study=detector/int8_int16 tracking.experiment=detector tracking.registered_model=detector \
    'security.allow=[detector]'

echo "5. Write it for Horizon's plugin."
python -m qflow.export from=models:/detector@champion target=plugin out=handover 'security.allow=[detector]'
