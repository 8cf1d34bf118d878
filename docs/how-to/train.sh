# A training as a person starts it: settings first, then the script.
export OMP_NUM_THREADS=1
python train.py --epochs 1
