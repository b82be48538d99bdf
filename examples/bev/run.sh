#!/usr/bin/env sh
# A temporal bird's-eye-view network that int8 ruins, and the operator that does it. Run it in this folder: sh run.sh
# Further overrides go to every command: sh run.sh task.data.evaluation=16
set -e
common="task=bev repair=none"

echo "1. All int8: nearly nothing is found. (Exit code 1 means that the goal is missed.)"
python -m qflow.trial $common "$@" || test $? -eq 1

echo "2. Where does it start? The table by layer is in compare_per_layer_out.txt, a page of all in analysis.html."
python -m qflow.analyze +experiment=int8_int16 $common "$@"

echo "3. The operator that the analysis names, in int16: as good as float, for 0.001 ms."
python -m qflow.trial $common 'qconfig.modules={\[cat\]: qint16}' "$@"

echo "4. Or the cause itself: positions in units of 64 m instead of centimetres. All int8 is as good as float."
python -m qflow.trial $common task.name=bev_units task.model.unit=64 "$@"
