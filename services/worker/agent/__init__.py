"""A worker among the services: its channel to the coordinator, what it holds, who watches over it."""
