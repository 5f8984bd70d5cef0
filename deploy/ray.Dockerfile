# The image of deploy/kuberay.yaml: docker build -f deploy/ray.Dockerfile -t argus-ray:0.1 .
FROM rayproject/ray:2.60.0-py311-gpu
COPY --chown=ray:users . /home/ray/argus
RUN pip install --no-cache-dir -c /home/ray/argus/constraints.txt '/home/ray/argus[ray,postgres,s3]'
