set -x
timeout 120 python -m pytest -q -x tests/test_gpu.py -k "training" -s -p no:cacheprovider 2>&1 | tail -40
timeout 200 python bench/training.py --steps 16 --dtypes bf16,fp32 --out $OUT/train.json 2>&1 | grep -v "^  {" | cut -c1-400
cat > /tmp/prof.py <<'P'
import torch, time, tempfile
from pathlib import Path
import sys; sys.path.insert(0,'.')
from bench.training import make_batches, make_model, ours, LR
from bench.common import ROOT
from sert_min.models import save_model, load_model
from sert_min import finetune
with tempfile.TemporaryDirectory() as f:
    save_model(make_model("124M"), Path(f)/"model", ROOT, {})
    model=load_model(Path(f)/"model","cuda")
    opt=finetune.make_optimizer(model,LR)
    batches=make_batches(24,8,True)
    for i,b in enumerate(batches):
        torch.cuda.synchronize(); t=time.perf_counter(); finetune.train_step(model,opt,b,i,bf16=True); torch.cuda.synchronize(); print(round((time.perf_counter()-t)*1e3,2),end=' ')
    print()
    from torch.profiler import profile, ProfilerActivity
    with profile(activities=[ProfilerActivity.CPU,ProfilerActivity.CUDA]) as p:
        for i,b in enumerate(batches[:5]): finetune.train_step(model,opt,b,i,bf16=True)
    print(p.key_averages().table(sort_by="cuda_time_total",row_limit=25,max_name_column_width=60)[:9000])
P
timeout 120 python /tmp/prof.py 2>&1 | cut -c1-230
